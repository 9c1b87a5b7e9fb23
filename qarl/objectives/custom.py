"""An objective of the user's own: a function that the config names."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from qarl.config.objective import CustomConfig, ObjectiveConfig
from qarl.errors import DivergenceError, ObjectiveError
from qarl.hooks import check_call, load_function
from qarl.metrics import Histogram, Metric, Metrics, mean
from qarl.objectives.aggregate import ratio_metrics
from qarl.objectives.ratios import LossInputs, Ratios

KEY = "objective.function"


def custom(inputs: LossInputs, config: CustomConfig) -> tuple[Tensor, Metrics]:
    """The loss `function(inputs, **kwargs)`.

    Its metrics are `Metric`, `Histogram`, or plain numbers: means over the sequences of `inputs`. `actor/loss` and the
    metrics of the sequence ratios are added.

    Raises:
        ObjectiveError: bad inputs (see `Ratios.of`); or what the function returned is not a scalar loss with a gradient
            and a mapping of metrics.
        DivergenceError: the loss is NaN or infinite.
    """
    ratios = Ratios.of(inputs)
    loss, metrics = _checked(_load(config)(inputs, **config.kwargs), config.function)
    sequences = len(inputs.mask_BT)
    own = {name: mean(x * sequences, sequences) if isinstance(x, int | float) else x for name, x in metrics.items()}
    total = loss.item() * inputs.num_sequences
    return loss, own | {"actor/loss": mean(total, sequences)} | ratio_metrics(ratios)


def check_objective(config: ObjectiveConfig) -> None:
    """Load the function of a custom objective. Raises ConfigError when it cannot be loaded, or does not take
    `LossInputs` and the config's kwargs."""
    if isinstance(config, CustomConfig):
        _load(config)


def _load(config: CustomConfig) -> Callable[..., Any]:
    function = load_function(config.function, KEY)
    check_call(function, ["inputs"], config.kwargs, KEY)
    return function


def _checked(result: Any, name: str) -> tuple[Tensor, Mapping[str, Metric | Histogram | float]]:
    """What the function `name` returned, when it is a loss and metrics."""
    if not (isinstance(result, tuple) and len(result) == 2):
        raise _fault(name, f"a {type(result).__name__}, not (loss, metrics)")
    loss, metrics = result
    if not isinstance(loss, Tensor):
        raise _fault(name, f"a loss of type {type(loss).__name__}, not a tensor")
    if loss.dim():
        raise _fault(name, f"a loss of shape {tuple(loss.shape)}, not a scalar", "sum it, divided by num_sequences")
    if not loss.requires_grad:
        raise _fault(name, "a loss without gradient", "compute it from inputs.logp_theta_BT, not detached")
    if not torch.isfinite(loss):
        raise DivergenceError(f"{KEY} {name} returned the loss {loss.item()}", "", "lower learner.optimizer.lr")
    if not isinstance(metrics, Mapping):
        raise _fault(name, f"metrics of type {type(metrics).__name__}, not a dict")
    for key, value in metrics.items():
        if not (isinstance(key, str) and isinstance(value, Metric | Histogram | float | int)):
            hint = "use a float (with .item()), or Metric of qarl.metrics"
            raise _fault(name, f"the metric {key!r} of type {type(value).__name__}", hint)
    return loss, metrics


def _fault(name: str, what: str, hint: str = "") -> ObjectiveError:
    return ObjectiveError(f"{KEY} {name} returned {what}", "", hint)

"""Seconds of a training step on this machine, from layers of the model that run as in training."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from launch.tools.plan.speed import Load
from qarl.config.derived import kernel_of, numerics_of
from qarl.config.run import Config
from qarl.errors import QarlError
from qarl.numerics.dense import set_gradient_precision
from qarl.numerics.processor import threads
from qarl.quant.linear import requantize
from qarl.quant.scheme import QuantScheme
from qarl.types import TrainSequence
from trainer.batching import Batch, micro_batches
from trainer.policy import Policy

TIMED = 2**27
"""Parameters of the layers that are timed, at most: with optimizer and gradients 2 GB."""
ROUNDS = 3
"""Timed runs of each part after one that warms up; the shortest counts."""


@dataclass(frozen=True)
class ModelTimes:
    """Seconds of the whole model on CPU."""

    decode: float
    """Linear layers of one engine step, for one token of each sequence."""
    prefill: float
    """An engine's prompts of a step."""
    score: float
    """A forward of all that a rank learns from in a step."""
    update: float
    """A rank's optimizer steps: quantization, forward, backward, gradient norm and AdamW."""


def time_model(
    config: Config, model: Any, layer_parameters: int, scheme: QuantScheme, load: Load, slots: int
) -> ModelTimes:
    """Time a model with random weights: with one layer, and with as many as `TIMED` allows, at least two. Layers beyond
    them cost what these cost.

    Args:
        model: the transformers config.
        layer_parameters: of one layer.
        slots: sequences that decode at once.

    Raises QarlError: the larger model was faster.
    """
    many = min(max(2, TIMED // layer_parameters), max(2, model.num_hidden_layers))
    parts = [part for layers in (1, many) for part in _parts(config, model, layers, scheme, load, slots)]
    # In turn, so that nothing that warms up or passes by falls on one number of layers alone.
    seconds = np.array([[_seconds(part) for part in parts] for _ in range(ROUNDS + 1)])[1:].min(axis=0)
    few_s, many_s = seconds.reshape(2, -1)
    if (many_s < few_s).any():
        raise QarlError(
            f"{many} layers took less time than one: {many_s.round(4).tolist()} s, not {few_s.round(4).tolist()} s",
            where="qarl plan --measure",
            hint="measure again while the machine is idle",
        )
    times = ModelTimes(*(few_s + (model.num_hidden_layers - 1) / (many - 1) * (many_s - few_s)).tolist())
    return replace(times, score=load.minibatches * times.score, update=load.minibatches * times.update)


def _parts(
    config: Config, model: Any, layers: int, scheme: QuantScheme, load: Load, slots: int
) -> list[Callable[[], None]]:
    """What the fields of `ModelTimes` time, of a model with this many layers; the last two of one minibatch."""
    policy = _policy(config, model, layers, scheme if config.learner.aligned else QuantScheme("none"))
    vocabulary, rng = model.vocab_size, np.random.default_rng(0)

    def batch(groups: int, group_size: int, prompt: int, response: int) -> list[TrainSequence]:
        rows = []
        for _ in range(groups):
            start = tuple(rng.integers(vocabulary, size=prompt).tolist())
            for _ in range(group_size):
                ids = tuple(rng.integers(vocabulary, size=response).tolist())
                rows.append(TrainSequence(start, ids, np.zeros(response, np.float32)))
        return rows

    size, prompt, response = config.train.group_size, load.prompt_tokens, max(1, round(load.response_tokens))
    decoded = Batch.of(batch(slots, 1, 1, 1), policy.device)
    prompts = Batch.of(batch(max(1, load.samples // size // load.workers), 1, prompt, 1), policy.device)
    minibatch = batch(max(1, load.samples // size // load.minibatches), size, prompt, response)
    most = config.learner.max_tokens_per_micro_batch
    parts = micro_batches(minibatch, most, load.ranks, policy.keeps_padding)[0]
    learned = [Batch.of([minibatch[i] for i in part], policy.device) for part in parts if part]
    optimizer = torch.optim.AdamW(policy.parameters(), fused=True)

    rank = config.learner.num_threads
    set_gradient_precision(config.learner.gradient_precision)

    def score(batches: list[Batch], cores: int) -> None:
        with threads(cores), torch.no_grad():
            for one in batches:
                policy(one)

    def update() -> None:
        with threads(rank):
            requantize(policy)
            optimizer.zero_grad()
            for one in learned:
                policy(one, "value").logprobs_BT.sum().backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.step()

    return [partial(score, [decoded], 1), partial(score, [prompts], 1), partial(score, learned, rank), update]


def _policy(config: Config, model: Any, layers: int, scheme: QuantScheme) -> Policy:
    """A learner's policy of this many layers with random weights."""
    keys = model.to_dict() | {"num_hidden_layers": layers}
    if keys.get("layer_types"):
        keys["layer_types"] = (layers * keys["layer_types"])[:layers]
    dtype, numerics = getattr(torch, config.model.dtype), numerics_of(config, "cpu")
    transformers_logging.disable_progress_bar()
    with TemporaryDirectory() as folder:
        AutoModelForCausalLM.from_config(AutoConfig.for_model(**keys), dtype=dtype).save_pretrained(folder)
        policy = Policy(Path(folder), dtype, scheme, numerics, kernel=kernel_of(config, numerics, "cpu"))
    return policy.train()


def _seconds(run: Callable[[], None]) -> float:
    started = perf_counter()
    run()
    return perf_counter() - started

"""`qarl bench objectives`: what each loss costs beside a plain masked mean of the same tensors."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from qarl.config.objective import AdaptiveClip, DrGRPOConfig, SequenceTIS, TokenMask, TokenTIS
from qarl.objectives.ratios import LossInputs
from qarl.objectives.registry import OBJECTIVES, compute_loss

TARGET = 5.0
SEQUENCES, TOKENS = 64, 2048
YARDSTICK = "masked means of three"


class LargestTensor(TorchDispatchMode):
    """Notes the bytes of the largest tensor that any operation under it made."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = result if isinstance(result, tuple | list) else (result,)
        self.bytes = max([self.bytes, *(t.numel() * t.element_size() for t in made if isinstance(t, Tensor))])
        return result


def random_inputs(sequences: int, tokens: int, seed: int = 0) -> LossInputs:
    """Log-probs of three nearby policies; responses fill a quarter to all of the width."""
    generator = torch.Generator().manual_seed(seed)
    shape = (sequences, tokens)
    prox_BT = -3 * torch.rand(shape, generator=generator)
    theta_BT = (prox_BT + 0.05 * torch.randn(shape, generator=generator)).requires_grad_()
    samp_BT = prox_BT + 0.05 * torch.randn(shape, generator=generator)
    lengths_B1 = torch.randint(tokens // 4, tokens + 1, (sequences, 1), generator=generator)
    mask_BT = torch.arange(tokens) < lengths_B1
    advantage_B = torch.randn(sequences, generator=generator)
    return LossInputs(theta_BT, prox_BT, samp_BT, mask_BT, advantage_B, sequences, int(mask_BT.sum()))


def masked_means(inputs: LossInputs) -> Tensor:
    """The yardstick: a masked mean of each of the three log-prob tensors that a loss reads."""
    tensors = (inputs.logp_theta_BT, inputs.logp_prox_BT, inputs.logp_samp_BT)
    tokens = inputs.mask_BT.sum()
    return torch.stack([(t * inputs.mask_BT).sum() / tokens for t in tensors]).sum()


def masked_mean_of_one(inputs: LossInputs) -> Tensor:
    """A masked mean of the learner's log-probs alone, for comparison."""
    return (inputs.logp_theta_BT * inputs.mask_BT).sum() / inputs.mask_BT.sum()


def subjects() -> dict[str, Any]:
    """The configs measured: every objective with its defaults, and the costliest corrections."""
    defaults = {
        kind.model_fields["kind"].default: DrGRPOConfig(normalizer=TOKENS) if kind is DrGRPOConfig else kind()
        for kind in OBJECTIVES
    }
    grpo = defaults["grpo"]
    corrections = {
        f"grpo + {correction.kind}": grpo.model_copy(update={"correction": correction})
        for correction in (SequenceTIS(), TokenTIS(), TokenMask(), AdaptiveClip())
    }
    return defaults | {"tbpo, token level": defaults["tbpo"].model_copy(update={"level": "token"})} | corrections


def bench(repeats: int = 50, sequences: int = SEQUENCES, tokens: int = TOKENS) -> list[tuple[str, float, float, float]]:
    """Rows of (name, milliseconds, ratio to the masked mean, largest intermediate in log-prob tensors).

    Forward and backward, one thread; medians over `repeats` rounds, in each of which all run after one another.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    inputs = random_inputs(sequences, tokens)
    runs: dict[str, Callable[[], Tensor]] = {
        YARDSTICK: partial(masked_means, inputs),
        "masked mean of one": partial(masked_mean_of_one, inputs),
    }
    for name, config in subjects().items():
        runs[name] = partial(_loss, inputs, config)
    try:
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(repeats):
            for name, run in runs.items():
                started = time.perf_counter()
                torch.autograd.grad(run(), inputs.logp_theta_BT)
                seconds[name].append(time.perf_counter() - started)
    finally:
        torch.set_num_threads(threads)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    unit = inputs.logp_theta_BT.numel() * inputs.logp_theta_BT.element_size()
    rows = []
    for name, run in runs.items():
        with LargestTensor() as largest:
            torch.autograd.grad(run(), inputs.logp_theta_BT)
        rows.append((name, medians[name] * 1e3, medians[name] / medians[YARDSTICK], largest.bytes / unit))
    return rows


def main() -> None:
    """Print the table."""
    print(f"{SEQUENCES} x {TOKENS} tokens, float32, forward and backward, one thread; target: ratio <= {TARGET:g}")
    print(f"{'loss':24s} {'ms':>8s} {'ratio':>7s} {'largest intermediate':>21s}")
    for name, milliseconds, ratio, largest in bench():
        verdict = "" if ratio <= TARGET else "  above the target"
        print(f"{name:24s} {milliseconds:8.3f} {ratio:7.2f} {largest:15.2f} x logp{verdict}")


def _loss(inputs: LossInputs, config: Any) -> Tensor:
    return compute_loss(inputs, config)[0]

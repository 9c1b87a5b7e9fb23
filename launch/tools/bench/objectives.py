"""`qarl bench objectives`: what each loss costs beside a plain masked mean of the same tensors."""

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from launch.tools.bench.compare import HEADER, Case, compare
from qarl.config.objective import AdaptiveClip, DrGRPOConfig, SequenceTIS, TokenMask, TokenTIS
from qarl.numerics.processor import threads
from qarl.objectives.ratios import LossInputs
from qarl.objectives.registry import OBJECTIVES, compute_loss

TARGET = 5.0


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


def random_inputs(sequences: int, tokens: int) -> LossInputs:
    """Log-probs of three nearby policies; responses fill a quarter to all of the width."""
    generator = torch.Generator().manual_seed(0)
    shape = (sequences, tokens)
    prox_BT = -3 * torch.rand(shape, generator=generator)
    theta_BT = (prox_BT + 0.05 * torch.randn(shape, generator=generator)).requires_grad_()
    samp_BT = prox_BT + 0.05 * torch.randn(shape, generator=generator)
    lengths_B1 = torch.randint(tokens // 4, tokens + 1, (sequences, 1), generator=generator)
    mask_BT = torch.arange(tokens) < lengths_B1
    advantage_B = torch.randn(sequences, generator=generator)
    return LossInputs(theta_BT, prox_BT, samp_BT, mask_BT, advantage_B, sequences, int(mask_BT.sum()))


def masked_means(inputs: LossInputs) -> Tensor:
    """What the losses are measured by: a masked mean of each of the three log-prob tensors that a loss reads."""
    tensors = (inputs.logp_theta_BT, inputs.logp_prox_BT, inputs.logp_samp_BT)
    tokens = inputs.mask_BT.sum()
    return torch.stack([(t * inputs.mask_BT).sum() / tokens for t in tensors]).sum()


def subjects(tokens: int) -> dict[str, Any]:
    """The configs measured: every objective with its defaults, and the costliest corrections."""
    defaults = {
        kind.model_fields["kind"].default: DrGRPOConfig(normalizer=tokens) if kind is DrGRPOConfig else kind()
        for kind in OBJECTIVES
    }
    grpo = defaults["grpo"]
    corrections = {
        f"grpo + {correction.kind}": grpo.model_copy(update={"correction": correction})
        for correction in (SequenceTIS(), TokenTIS(), TokenMask(), AdaptiveClip())
    }
    return defaults | {"tbpo, token level": defaults["tbpo"].model_copy(update={"level": "token"})} | corrections


def bench(rounds: int, sequences: int = 64, tokens: int = 2048) -> Iterator[str]:
    """Times, forward and backward, in float32 on one thread; then the largest tensor that each loss makes."""
    inputs = random_inputs(sequences, tokens)
    losses: dict[str, Callable[[], Tensor]] = {"masked means of three": partial(masked_means, inputs)}
    for name, config in subjects(tokens).items():
        losses[name] = lambda config=config: compute_loss(inputs, config)[0]  # type: ignore[misc]
    runs = {name: partial(_gradient, loss, inputs) for name, loss in losses.items()}
    targets = dict.fromkeys(list(runs)[1:], TARGET)
    yield HEADER
    with threads(1):
        yield from compare(Case(f"{sequences} x {tokens} tokens", runs, targets), rounds, time.perf_counter)
    for name, run in runs.items():
        with LargestTensor() as largest:
            run()
        yield f"{name}: largest tensor {largest.bytes / inputs.logp_theta_BT.nbytes:.2f} x the log-probs"


def _gradient(loss: Callable[[], Tensor], inputs: LossInputs) -> None:
    torch.autograd.grad(loss(), inputs.logp_theta_BT)

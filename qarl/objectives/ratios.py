"""The inputs of every loss, their checks, and the log-ratios of the three policies.

    r_t = pi_theta / pi_prox     the drift of the update        w_t = pi_prox / pi_samp     sampler-learner mismatch

Sequence ratios are geometric means over the response (GSPO, arXiv 2507.18071).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

from qarl.errors import DivergenceError, ObjectiveError

LARGEST_LOG = 20.0
"""Log-ratios are clamped to this: beyond it exp could overflow, and infinity times a zero gradient is NaN. Every band
ends far below e^20."""


@dataclass(frozen=True)
class LossInputs:
    """The tensors of one micro-batch, and the size of the minibatch that contains it.

    `logp_*_BT` are log-probs (nats, float32) of the sampled tokens. Values where `mask_BT` is False never matter, even
    NaN and infinity. A loss is divided by `num_sequences` or `num_tokens`, so that the losses of all micro-batches add
    up to the loss of the minibatch.
    """

    logp_theta_BT: Tensor
    """Under the learner now; the only tensor with a gradient."""
    logp_prox_BT: Tensor
    """Under the learner before this update."""
    logp_samp_BT: Tensor
    """Under the sampler."""
    mask_BT: Tensor
    """bool, True at the response tokens that the loss counts."""
    advantage_B: Tensor
    num_sequences: int
    """Sequences of the whole minibatch, over all micro-batches and ranks."""
    num_tokens: int
    """Its response tokens that the loss counts."""
    ids: Sequence[int | str] = ()
    """Names of the sequences, for errors; when empty they are numbered from 0."""
    logp_ref_BT: Tensor | None = None
    """Under the reference model; None unless `kl_coef` > 0."""
    entropy_BT: Tensor | None = None
    """Entropy (nats) of the distribution of each token; None unless it is computed."""

    def named(self, chosen_B: Tensor | None = None) -> str:
        """The ids of the chosen sequences (bool [B]), or of all of them, for an error."""
        ids = self.ids or range(len(self.mask_BT))
        return str(list(ids) if chosen_B is None else [ids[i] for i in chosen_B.nonzero()[:, 0].tolist()])


@dataclass(frozen=True)
class Ratios:
    """Log-ratios in nats, float32 (float64 when the log-probs are), zero where masked."""

    log_r_BT: Tensor
    """log pi_theta - log pi_prox; carries the gradient."""
    log_w_BT: Tensor
    """log pi_prox - log pi_samp; no gradient."""
    lengths_B: Tensor
    """Response tokens of each sequence."""
    log_r_B: Tensor
    """Mean of `log_r_BT` over the response."""
    log_w_B: Tensor
    """Mean of `log_w_BT` over the response."""

    @cached_property
    def w_BT(self) -> Tensor:
        """w_t, 1 where masked."""
        return bounded_exp(self.log_w_BT)

    @classmethod
    def of(cls, inputs: LossInputs) -> Self:
        """Check the inputs and compute the ratios.

        Raises:
            ObjectiveError: see `check_shapes`; or an advantage is not finite, a response is empty, or the minibatch is
                smaller than this micro-batch. It names the sequences.
            DivergenceError: a sampled token has a NaN or infinite log-prob. It names the sequences.
        """
        check_shapes(inputs)
        mask_BT, advantage_B = inputs.mask_BT, inputs.advantage_B
        log_r_BT = token_log_ratio(inputs.logp_theta_BT, inputs.logp_prox_BT.detach(), mask_BT)
        log_w_BT = token_log_ratio(inputs.logp_prox_BT.detach(), inputs.logp_samp_BT.detach(), mask_BT)
        lengths_B = mask_BT.sum(1)
        if (lengths_B == 0).any():
            raise ObjectiveError(f"sequences {inputs.named(lengths_B == 0)} have no response token")
        tokens = int(lengths_B.sum())
        if inputs.num_sequences < len(mask_BT) or inputs.num_tokens < tokens:
            raise ObjectiveError(
                f"sequences {inputs.named()} with {tokens} tokens exceed their minibatch: num_sequences="
                f"{inputs.num_sequences}, num_tokens={inputs.num_tokens}"
            )
        log_r_B, log_w_B = log_r_BT.sum(1) / lengths_B, log_w_BT.sum(1) / lengths_B
        check_finite(torch.isfinite(log_r_B) & torch.isfinite(log_w_B), inputs)
        if not torch.isfinite(advantage_B).all():
            raise ObjectiveError(f"NaN or infinite advantage of sequences {inputs.named(~torch.isfinite(advantage_B))}")
        return cls(log_r_BT, log_w_BT, lengths_B, log_r_B, log_w_B)


def token_log_ratio(logp_BT: Tensor, logp_ref_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """`log p(y_t) - log p_ref(y_t)` [B, T] in float32 or better, zero where masked."""
    # Select, do not multiply: NaN times zero would reach the gradient.
    return torch.where(mask_BT, _precise(logp_BT) - _precise(logp_ref_BT), 0.0)


def check_shapes(inputs: LossInputs) -> None:
    """Raises ObjectiveError unless there is one advantage and one id (if any) for each sequence, and every other tensor
    has the shape of the mask. It names the wrong tensors and the sequences."""
    mask_BT = inputs.mask_BT
    if inputs.ids and len(inputs.ids) != len(mask_BT):
        raise ObjectiveError(f"{len(inputs.ids)} ids {list(inputs.ids)} for {len(mask_BT)} sequences")
    if inputs.advantage_B.shape != mask_BT.shape[:1]:
        shape = tuple(inputs.advantage_B.shape)
        raise ObjectiveError(f"{shape} advantages for {len(mask_BT)} sequences {inputs.named()}")
    fields = {
        "learner": inputs.logp_theta_BT,
        "prox": inputs.logp_prox_BT,
        "sampler": inputs.logp_samp_BT,
        "reference": inputs.logp_ref_BT,
        "entropy": inputs.entropy_BT,
    }
    other = [f"{name} {tuple(x.shape)}" for name, x in fields.items() if x is not None and x.shape != mask_BT.shape]
    if other:
        what = f"{', '.join(other)} and mask {tuple(mask_BT.shape)} of sequences {inputs.named()} must have one shape"
        raise ObjectiveError(what)


def check_finite(finite_B: Tensor, inputs: LossInputs, what: str = "log-prob") -> None:
    """Raises DivergenceError, which names the sequences, unless all are `finite_B`."""
    if not finite_B.all():
        raise DivergenceError(
            f"NaN or infinite {what} in sequences {inputs.named(~finite_B)}",
            hint="lower learner.optimizer.lr, or continue from the last checkpoint with other settings",
        )


def bounded_exp(log_ratio: Tensor) -> Tensor:
    """exp without overflow: at most e^20, without gradient beyond."""
    return log_ratio.clamp(max=LARGEST_LOG).exp()


def _precise(logp_BT: Tensor) -> Tensor:
    return logp_BT if logp_BT.dtype == torch.float64 else logp_BT.float()

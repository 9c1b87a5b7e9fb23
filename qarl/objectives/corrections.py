"""Weights against the mismatch of sampler and learner, the same for every objective.

    none              1
    token_tis         min(w_t, cap)                       truncated importance sampling (Yao et al. 2025, "Your
                                                          efficient RL framework secretly brings you off-policy RL")
    adaptive_clip     as token_tis, and a bound           adaptive clipping range (QuRL, arXiv 2602.13953): where the
                                                          weight is truncated, the clip's upper bound is raised by the
                                                          factor that the weight lost, see `upper_clip_bound`
    sequence_tis      min(w_seq, cap)                     the same on the sequence; TBPO's, arXiv 2604.07853
    token_mask        w_t   if low <= w_t <= high else 0  IcePop (Ring-1T, arXiv 2510.18855)
    sequence_mask     w_seq if low <= w_seq <= high else 0    masked importance sampling, MIS
    sequence_reject   1     if low <= w_seq <= high else 0    sequence rejection

`w_t = pi_prox / pi_samp` without gradient; `w_seq` is its geometric mean over the response. Interpreted: the works on
TIS and MIS also use the plain product over the response, which leaves any fixed band as responses grow. A weight of 0
leaves the normaliser of the loss as it is. Suffixes: B sequences, T response tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qarl.metrics import Metrics, mean
from qarl.objectives.config import (
    AdaptiveClip,
    CorrectionConfig,
    NoCorrection,
    SequenceMask,
    SequenceReject,
    SequenceTIS,
    TokenMask,
    TokenTIS,
)
from qarl.objectives.ratios import Ratios, bounded_exp


def mismatch_weight(ratios: Ratios, config: CorrectionConfig | AdaptiveClip) -> tuple[Tensor | None, Metrics]:
    """The weight, [B] or [B, T] as the correction is (None for 1, undefined where masked), and partial metrics."""
    w_B = bounded_exp(ratios.log_w_B)
    sequences = len(w_B)
    metrics = {"actor/seq_mismatch_weight_mean": mean(w_B.sum().item(), sequences)}
    match config:
        case NoCorrection():
            return None, metrics
        case SequenceTIS():
            share = mean((w_B > config.cap).sum().item(), sequences)
            return w_B.clamp(max=config.cap), metrics | {"actor/seq_mismatch_weight_capped": share}
        case SequenceMask() | SequenceReject():
            kept_B = (w_B >= config.low) & (w_B <= config.high)
            share = mean(sequences - kept_B.sum().item(), sequences)
            values_B = w_B if isinstance(config, SequenceMask) else torch.ones_like(w_B)
            return values_B * kept_B, metrics | {"actor/sequences_dropped": share}
    w_BT = ratios.w_BT
    tokens = int(ratios.lengths_B.sum())
    match config:
        case TokenTIS() | AdaptiveClip():
            above = (w_BT > config.cap).sum().item()  # none of the masked: their w is 1
            return w_BT.clamp(max=config.cap), metrics | {"actor/token_mismatch_weight_capped": mean(above, tokens)}
        case TokenMask():
            kept_BT = (w_BT >= config.low) & (w_BT <= config.high)
            dropped = kept_BT.numel() - kept_BT.sum().item()  # none of the masked: their w is 1, which the band holds
            return w_BT * kept_BT, metrics | {"actor/tokens_dropped": mean(dropped, tokens)}


def upper_clip_bound(bound: float, ratios: Ratios, config: CorrectionConfig | AdaptiveClip) -> float | Tensor:
    """The `bound` on the ratio for positive advantages; with `adaptive_clip` [B, T], `bound * max(1, w_t / cap)`.

    Truncation scales the update of a token by `min(w_t, cap) / w_t`, and with it its clip range. QuRL divides the
    bound by that factor.
    """
    if not isinstance(config, AdaptiveClip):
        return bound
    return (ratios.w_BT * (bound / config.cap)).clamp(min=bound)

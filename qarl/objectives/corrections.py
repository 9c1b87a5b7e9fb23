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

from math import exp

import torch
from torch import Tensor

from qarl.config.objective import (
    AdaptiveClip,
    CorrectionConfig,
    NoCorrection,
    SequenceMask,
    SequenceReject,
    SequenceTIS,
    TokenMask,
    TokenTIS,
)
from qarl.metrics import Histogram, Metrics, effective_sample_size, mean
from qarl.objectives.ratios import Ratios, bounded_exp

_EDGES = (1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1.0)
LOG_EDGES = (*(-edge for edge in reversed(_EDGES)), *_EDGES)
"""Bins of log w_seq: finer towards 0, which has the one in the middle."""


def mismatch_weight(
    ratios: Ratios, config: CorrectionConfig | AdaptiveClip
) -> tuple[Tensor | None, Tensor | None, Metrics]:
    """The weight, [B] or [B, T] as the correction is (None for 1, undefined for padding); where the correction's mask
    made it 0, bool in the same shape (None for nowhere); and partial metrics."""
    w_B = bounded_exp(ratios.log_w_B)
    sequences = len(w_B)
    metrics = _weight_metrics(w_B, ratios.log_w_B)
    match config:
        case NoCorrection():
            return None, None, metrics
        case SequenceTIS():
            share = mean((w_B > config.cap).sum().item(), sequences)
            return w_B.clamp(max=config.cap), None, metrics | {"actor/seq_mismatch_weight_capped": share}
        case SequenceMask() | SequenceReject():
            masked_B = (w_B < config.low) | (w_B > config.high)
            share = mean(masked_B.sum().item(), sequences)
            values_B = w_B if isinstance(config, SequenceMask) else torch.ones_like(w_B)
            return values_B * ~masked_B, masked_B, metrics | {"actor/seq_mismatch_weight_masked": share}
    w_BT = ratios.w_BT
    tokens = int(ratios.lengths_B.sum())
    match config:
        case TokenTIS() | AdaptiveClip():
            share = mean((w_BT > config.cap).sum().item(), tokens)  # no padding: there w is 1
            return w_BT.clamp(max=config.cap), None, metrics | {"actor/token_mismatch_weight_capped": share}
        case TokenMask():
            masked_BT = (w_BT < config.low) | (w_BT > config.high)  # no padding: there w is 1, which the band holds
            share = mean(masked_BT.sum().item(), tokens)
            return w_BT.masked_fill(masked_BT, 0.0), masked_BT, metrics | {"actor/token_mismatch_weight_masked": share}


def _weight_metrics(w_B: Tensor, log_w_B: Tensor) -> Metrics:
    """Where the sequence weights are, before any correction."""
    total, count = w_B.sum().item(), len(w_B)
    bins_B = torch.bucketize(log_w_B, log_w_B.new_tensor(LOG_EDGES[1:-1]))
    counts = torch.bincount(bins_B, minlength=len(LOG_EDGES) - 1).tolist()
    return {
        "actor/seq_mismatch_weight_mean": mean(total, count),
        "actor/seq_mismatch_weight_eff_sample_size": effective_sample_size(total, w_B.square().sum().item(), count),
        "actor/seq_mismatch_weight_hist": Histogram(tuple(map(exp, LOG_EDGES)), tuple(counts)),
    }


def upper_clip_bound(bound: float, ratios: Ratios, config: CorrectionConfig | AdaptiveClip) -> float | Tensor:
    """The `bound` on the ratio for positive advantages; with `adaptive_clip` [B, T], `bound * max(1, w_t / cap)`.

    Truncation scales the update of a token by `min(w_t, cap) / w_t`, and with it its clip range. QuRL divides the
    bound by that factor.
    """
    if not isinstance(config, AdaptiveClip):
        return bound
    return (ratios.w_BT * (bound / config.cap)).clamp(min=bound)

"""Weights that correct the mismatch of sampler and learner, the same for every objective.

    none              1
    token_tis         min(w_t, cap)                       truncated importance sampling (Yao et al. 2025, "Your
                                                          efficient RL framework secretly brings you off-policy RL")
    adaptive_clip     as token_tis, and a bound           adaptive clipping range (QuRL, arXiv 2602.13953): where the
                                                          weight is truncated, the clip's upper bound is raised by the
                                                          same factor, see `upper_clip_bound`
    sequence_tis      min(w_seq, cap)                     truncation of the sequence weight (TBPO, arXiv 2604.07853)
    token_mask        w_t   if low <= w_t <= high else 0  IcePop (Ring-1T, arXiv 2510.18855)
    sequence_mask     w_seq if low <= w_seq <= high else 0    masked importance sampling, MIS
    sequence_reject   1     if low <= w_seq <= high else 0    sequence rejection

`w_t = pi_prox / pi_samp` without gradient; `w_seq` is its geometric mean over the response (our choice: the papers on
TIS and MIS also use the plain product, which leaves any fixed band as responses grow). A weight of 0 does not change
the normalizer of the loss.
"""

from dataclasses import dataclass, replace
from math import exp

import torch
from torch import Tensor

from qarl.config import objective as config_of
from qarl.config.objective import CorrectionConfig
from qarl.metrics import Histogram, Metrics, effective_sample_size, mean
from qarl.objectives.ratios import Ratios, bounded_exp

_EDGES = (1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1.0)
LOG_EDGES = (*(-edge for edge in reversed(_EDGES)), *_EDGES)
"""Bins of log w_seq, finer near 0; the middle bin holds 0."""


@dataclass(frozen=True)
class Weight:
    """The mismatch weight of token t in sequence b: `sequence_B[b] * token_BT[b, t]`, without gradient.

    A correction sets one of the two factors, the other stays 1. They are kept apart because a sequence's factor can be
    applied after the sum over its tokens.
    """

    sequence_B: Tensor
    token_BT: Tensor
    """1 at padding."""
    masked_BT: Tensor
    """bool: the correction set the weight to 0 because it left the band. Means nothing at padding."""


def mismatch_weight(ratios: Ratios, config: CorrectionConfig | config_of.AdaptiveClip) -> tuple[Weight, Metrics]:
    """The weight of every token, and partial metrics."""
    w_B = bounded_exp(ratios.log_w_B)
    metrics = _weight_metrics(w_B, ratios.log_w_B)
    log_w_BT = ratios.log_w_BT
    one = Weight(torch.ones_like(w_B), torch.ones_like(log_w_BT), torch.zeros_like(log_w_BT, dtype=torch.bool))
    match config:
        case config_of.NoCorrection():
            return one, metrics
        case config_of.SequenceTIS():
            capped = mean((w_B > config.cap).sum().item(), len(w_B))
            weight = replace(one, sequence_B=w_B.clamp(max=config.cap))
            return weight, metrics | {"actor/seq_mismatch_weight_capped": capped}
        case config_of.SequenceMask() | config_of.SequenceReject():
            masked_B = (w_B < config.low) | (w_B > config.high)
            kept_B = w_B if isinstance(config, config_of.SequenceMask) else one.sequence_B
            weight = replace(one, sequence_B=kept_B * ~masked_B, masked_BT=masked_B[:, None].expand_as(log_w_BT))
            return weight, metrics | {"actor/seq_mismatch_weight_masked": mean(masked_B.sum().item(), len(w_B))}
    w_BT = ratios.w_BT
    tokens = int(ratios.lengths_B.sum())
    match config:
        case config_of.TokenTIS() | config_of.AdaptiveClip():
            capped = mean((w_BT > config.cap).sum().item(), tokens)  # padding has weight 1, so it is never capped
            weight = replace(one, token_BT=w_BT.clamp(max=config.cap))
            return weight, metrics | {"actor/token_mismatch_weight_capped": capped}
        case config_of.TokenMask():
            masked_BT = (w_BT < config.low) | (w_BT > config.high)  # never padding: its weight 1 lies in the band
            weight = replace(one, token_BT=w_BT.masked_fill(masked_BT, 0.0), masked_BT=masked_BT)
            return weight, metrics | {"actor/token_mismatch_weight_masked": mean(masked_BT.sum().item(), tokens)}


def _weight_metrics(w_B: Tensor, log_w_B: Tensor) -> Metrics:
    """Mean, effective sample size and histogram of the sequence weights, before any correction."""
    total, count = w_B.sum().item(), len(w_B)
    bins_B = torch.bucketize(log_w_B, log_w_B.new_tensor(LOG_EDGES[1:-1]))
    counts = torch.bincount(bins_B, minlength=len(LOG_EDGES) - 1).tolist()
    return {
        "actor/seq_mismatch_weight_mean": mean(total, count),
        "actor/seq_mismatch_weight_eff_sample_size": effective_sample_size(total, w_B.square().sum().item(), count),
        "actor/seq_mismatch_weight_hist": Histogram(tuple(map(exp, LOG_EDGES)), tuple(counts)),
    }


def upper_clip_bound(bound: float, ratios: Ratios, config: CorrectionConfig | config_of.AdaptiveClip) -> float | Tensor:
    """The upper bound on the ratio for positive advantages: `bound`; with `adaptive_clip` `bound * max(1, w_t / cap)`,
    [B, T].

    Truncation scales the update of a token by `min(w_t, cap) / w_t`, and its clip range by the same factor. QuRL
    divides the bound by that factor.
    """
    if not isinstance(config, config_of.AdaptiveClip):
        return bound
    return (ratios.w_BT * (bound / config.cap)).clamp(min=bound)

"""TBPO, trust-band policy optimization (arXiv 2604.07853). Suffixes: B sequences, T response tokens."""

from __future__ import annotations

from math import inf

from torch import Tensor

from qarl.config.objective import SequenceTIS, TBPOConfig
from qarl.metrics import Metrics, mean
from qarl.objectives.aggregate import ratio_metrics, sequence_weight, token_sums
from qarl.objectives.band import Band
from qarl.objectives.corrections import mismatch_weight
from qarl.objectives.ratios import LossInputs, Ratios, bounded_exp


def tbpo(inputs: LossInputs, config: TBPOConfig) -> tuple[Tensor, Metrics]:
    """Sequence-level policy gradient with a trust band on both sides for negative advantages.

        r = exp((1/T) sum_t log pi_theta/pi_prox)          w = exp((1/T) sum_t log pi_prox/pi_samp)
        s = min(r A, clip(r, 1-eps_low, 1+eps_high) A)     for A >= 0
        s = clip(r, 1-neg_low, 1+neg_high) A               for A < 0: no gradient outside the band
        loss = -(1/num_sequences) sum_b sg(min(w, C)) s

    Ablations: `level: token` has r_t = pi_theta/pi_prox in place of r and the mean of s over the response (of it the
    paper says no more than "token-level dual-clip"; w stays the sequence's); `dual_clip: false` leaves s = max(r,
    1-neg_low) A for A < 0; `positive_only` sets s = 0 for A < 0, which counts as masked; `correction` takes another
    weight than min(w, C).

    Returns:
        scalar loss and partial metrics. A clip is counted where the chosen branch is the clipped one.
    Raises:
        ObjectiveError: see `Ratios.of`.
    """
    ratios = Ratios.of(inputs)
    correction = config.correction or SequenceTIS(cap=config.seq_tis_imp_ratio_cap)
    weight, masked, metrics = mismatch_weight(ratios, correction)
    ratio = bounded_exp(ratios.log_r_B if config.level == "sequence" else ratios.log_r_BT)
    band = Band.of(
        ratio,
        inputs.advantage_B,
        pos_high=1 + config.seq_clip_ratio_high,
        neg_low=1 - config.neg_seq_clip_ratio_low,
        neg_high=1 + config.neg_seq_clip_ratio_high if config.dual_clip else inf,
    )
    advantage_B = inputs.advantage_B.clamp(min=0.0) if config.positive_only else inputs.advantage_B
    if config.level == "sequence":
        weight_B = sequence_weight(weight, ratios, inputs.mask_BT)
        masked = weight_B == 0
        total = -(weight_B * (band.clamped() * advantage_B)).sum()
    else:
        sums_B = token_sums(band.clamped(), weight, inputs.mask_BT)
        total = -(sums_B / ratios.lengths_B * advantage_B).sum()
    if config.positive_only:
        masked = _with_negatives(masked, inputs)
    metrics |= band.metrics(masked, ratios.lengths_B) | ratio_metrics(ratios)
    return total / inputs.num_sequences, {"actor/loss": mean(total.item(), len(advantage_B))} | metrics


def _with_negatives(masked: Tensor | None, inputs: LossInputs) -> Tensor:
    """What is `masked` (None, [B] or [B, T]), and every sequence of negative advantage."""
    negative_B = inputs.advantage_B < 0
    if masked is None:
        return negative_B
    return masked | (negative_B if masked.dim() == 1 else negative_B[:, None] & inputs.mask_BT)

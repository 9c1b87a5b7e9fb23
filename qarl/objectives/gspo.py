"""GSPO, group sequence policy optimization (arXiv 2507.18071). Suffixes: B sequences, T response tokens."""

from __future__ import annotations

from torch import Tensor

from qarl.metrics import Metrics, mean
from qarl.objectives.aggregate import ratio_metrics, sequence_weight
from qarl.objectives.band import Band
from qarl.objectives.config import GSPOConfig
from qarl.objectives.corrections import mismatch_weight
from qarl.objectives.ratios import LossInputs, Ratios, bounded_exp


def gspo(inputs: LossInputs, config: GSPOConfig) -> tuple[Tensor, Metrics]:
    """PPO's clipped minimum, of sequences.

        r = exp((1/T) sum_t log pi_theta/pi_prox)
        loss = -(1/num_sequences) sum_b w min(r A, clip(r, 1-eps_low, 1+eps_high) A)

    `w` is the mismatch weight (1 in the paper); the default bounds 3e-4 and 4e-4 are the paper's.
    Returns and raises as `tbpo`.
    """
    ratios = Ratios.of(inputs)
    weight, _, metrics = mismatch_weight(ratios, config.correction)
    r_B = bounded_exp(ratios.log_r_B)
    band = Band.of(r_B, inputs.advantage_B, 1 + config.seq_clip_ratio_high, 1 - config.seq_clip_ratio_low)
    surrogate_B = band.clamped() * inputs.advantage_B
    weight_B = sequence_weight(weight, ratios, inputs.mask_BT)
    total = -(weight_B * surrogate_B).sum()
    metrics |= band.metrics(weight_B == 0, ratios.lengths_B) | ratio_metrics(ratios)
    return total / inputs.num_sequences, {"actor/loss": mean(total.item(), len(r_B))} | metrics

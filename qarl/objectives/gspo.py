"""GSPO, group sequence policy optimization (arXiv 2507.18071)."""

from torch import Tensor

from qarl.config.objective import GSPOConfig, TBPOConfig
from qarl.metrics import Metrics
from qarl.objectives.ratios import LossInputs
from qarl.objectives.tbpo import tbpo


def gspo(inputs: LossInputs, config: GSPOConfig) -> tuple[Tensor, Metrics]:
    """PPO's clipped minimum on sequence ratios: TBPO without dual clip, with one pair of bounds for both signs.

        r = exp((1/T) sum_t log pi_theta/pi_prox)
        loss = -(1/num_sequences) sum_b w min(r A, clip(r, 1-eps_low, 1+eps_high) A)

    `w` is the mismatch weight (1 in the paper); the default bounds 3e-4 and 4e-4 are the paper's.
    Returns and raises as `tbpo`.
    """
    single_clip = TBPOConfig(
        seq_clip_ratio_high=config.seq_clip_ratio_high,
        neg_seq_clip_ratio_low=config.seq_clip_ratio_low,
        dual_clip=False,
        correction=config.correction,
    )
    return tbpo(inputs, single_clip)

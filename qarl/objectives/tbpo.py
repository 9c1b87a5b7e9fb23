"""TBPO, trust-band policy optimization (arXiv 2604.07853), and GSPO (arXiv 2507.18071). Suffix K: as in `band.py`."""

from math import inf

from torch import Tensor

from qarl.config.objective import GSPOConfig, SequenceTIS, TBPOConfig
from qarl.metrics import Metrics, mean
from qarl.objectives.aggregate import drop_metrics, ratio_metrics, sequence_weight, token_sums
from qarl.objectives.band import Band
from qarl.objectives.corrections import mismatch_weight
from qarl.objectives.ratios import LossInputs, Ratios, bounded_exp


def tbpo(inputs: LossInputs, config: TBPOConfig) -> tuple[Tensor, Metrics]:
    """Sequence-level policy gradient; for negative advantages the ratio has a bound on both sides, the trust band.

        r = exp((1/T) sum_t log pi_theta/pi_prox)          w = exp((1/T) sum_t log pi_prox/pi_samp)
        s = min(r A, clip(r, 1-eps_low, 1+eps_high) A)     for A >= 0
        s = clip(r, 1-neg_low, 1+neg_high) A               for A < 0: no gradient outside the band
        loss = -(1/num_sequences) sum_b sg(min(w, C)) s

    Ablations: `level: token` has r_t = pi_theta/pi_prox in place of r, and averages s over the response (our choice;
    the paper only says "token-level dual-clip"; w stays the sequence's). `dual_clip: false` has s = max(r, 1-neg_low) A
    for A < 0. `positive_only` sets s = 0 for A < 0, and counts these sequences as masked. `correction` replaces the
    weight min(w, C).

    Returns:
        scalar loss and partial metrics. A clip counts where the chosen branch is the clipped one.
    Raises:
        ObjectiveError: see `Ratios.of`.
    """
    ratios = Ratios.of(inputs)
    correction = config.correction or SequenceTIS(cap=config.seq_tis_imp_ratio_cap)
    weight, metrics = mismatch_weight(ratios, correction)
    mask_BT = inputs.mask_BT
    if config.level == "sequence":
        log_r_BK, mask_BK = ratios.log_r_B[:, None], mask_BT.any(1, keepdim=True)
    else:
        log_r_BK, mask_BK = ratios.log_r_BT, mask_BT
    band = Band.of(
        bounded_exp(log_r_BK),
        mask_BK,
        inputs.advantage_B,
        pos_high=1 + config.seq_clip_ratio_high,
        neg_low=1 - config.neg_seq_clip_ratio_low,
        neg_high=1 + config.neg_seq_clip_ratio_high if config.dual_clip else inf,
    )
    advantage_B = inputs.advantage_B.clamp(min=0.0) if config.positive_only else inputs.advantage_B
    if config.level == "sequence":
        weight_B = sequence_weight(weight, ratios, mask_BT)
        masked_BK = (weight_B == 0)[:, None]
        total = -(weight_B * (band.clamped()[:, 0] * advantage_B)).sum()
    else:
        masked_BK = weight.masked_BT
        total = -(token_sums(band.clamped(), weight, mask_BT) / ratios.lengths_B * advantage_B).sum()
    if config.positive_only:
        masked_BK = masked_BK | (inputs.advantage_B < 0)[:, None]
    metrics |= band.clip_metrics(masked_BK) | ratio_metrics(ratios)
    metrics |= drop_metrics(band.outside_BK | masked_BK, inputs, ratios.lengths_B)
    return total / inputs.num_sequences, {"actor/loss": mean(total.item(), len(advantage_B))} | metrics


def gspo(inputs: LossInputs, config: GSPOConfig) -> tuple[Tensor, Metrics]:
    """GSPO, PPO's clipped minimum on sequence ratios: TBPO without dual clip, with one pair of bounds for both signs.

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

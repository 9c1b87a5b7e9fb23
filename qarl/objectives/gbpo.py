"""GBPO, group-relative bounded policy optimization (arXiv 2604.18578)."""

import torch
from torch import Tensor

from qarl.config.objective import GBPOConfig
from qarl.metrics import Metrics
from qarl.objectives.aggregate import drop_metrics, reduce, token_sums
from qarl.objectives.band import Band
from qarl.objectives.corrections import mismatch_weight
from qarl.objectives.ratios import LossInputs, Ratios, bounded_exp


def gbpo(inputs: LossInputs, config: GBPOConfig) -> tuple[Tensor, Metrics]:
    """Regression of the token ratio to the optimum of the bounded problem, which lies on the bound.

        target = 1 + eps_high for A > 0, 1 - eps_low for A < 0
        loss = (1/num_sequences) sum_b (1/T_b) sum_t w |A| |r_t - target|

    Within the bounds the gradient is that of the plain policy gradient, as with PPO; beyond the target it points back,
    where PPO has none. Our choices: the target depends on the sign of A, not of the advantage over the group's median
    (the paper finds no difference on a control task), and the temperature of the soft sign is 0, the limit in which the
    paper derives the optimum.
    Returns and raises as `tbpo`; a clip counts where the ratio is beyond its target.
    """
    ratios = Ratios.of(inputs)
    weight, metrics = mismatch_weight(ratios, config.correction)
    r_BT = bounded_exp(ratios.log_r_BT)
    high, low = 1 + config.clip_ratio_high, 1 - config.clip_ratio_low
    band = Band.of(r_BT, inputs.mask_BT, inputs.advantage_B, pos_high=high, neg_low=low)
    target_B1 = torch.where(inputs.advantage_B[:, None] < 0, band.low, band.high)
    sums_B = -token_sums((r_BT - target_B1).abs(), weight, inputs.mask_BT) * inputs.advantage_B.abs()
    loss, shared = reduce(sums_B, inputs, ratios, config.aggregation)
    metrics |= drop_metrics(weight.masked_BT, inputs, ratios.lengths_B)
    return loss, shared | metrics | band.clip_metrics(weight.masked_BT)

"""CISPO (MiniMax-M1, arXiv 2506.13585)."""

import torch
from torch import Tensor

from qarl.config.objective import CISPOConfig
from qarl.metrics import Metrics, mean
from qarl.objectives.aggregate import drop_metrics, reduce, token_sums
from qarl.objectives.corrections import mismatch_weight
from qarl.objectives.ratios import LossInputs, Ratios, bounded_exp


def cispo(inputs: LossInputs, config: CISPOConfig) -> tuple[Tensor, Metrics]:
    """The clipped ratio is a weight without gradient, so every token keeps a gradient.

        loss = -(1/num_tokens) sum_b sum_t w sg(clip(r_t, 1-eps_low, 1+eps_high)) A log pi_theta(y_t)

    Returns and raises as `tbpo`. The clip fraction is the share of tokens whose weight is clipped, from above (`_high`)
    or from below (`_low`), whatever the sign of A.
    """
    ratios = Ratios.of(inputs)
    weight, metrics = mismatch_weight(ratios, config.correction)
    r_BT = bounded_exp(ratios.log_r_BT.detach())
    low, high = 1 - config.is_clip_low, 1 + config.is_clip_high
    logp_BT = torch.where(inputs.mask_BT, inputs.logp_theta_BT, 0.0)
    sums_B = token_sums(r_BT.clamp(low, high) * logp_BT, weight, inputs.mask_BT) * inputs.advantage_B
    loss, shared = reduce(sums_B, inputs, ratios, "token_mean")
    counted_BT = inputs.mask_BT & (inputs.advantage_B != 0)[:, None] & ~weight.masked_BT
    above, below = (int((outside_BT & counted_BT).sum()) for outside_BT in (r_BT > high, r_BT < low))
    tokens = int(ratios.lengths_B.sum())
    for name, count in (("", above + below), ("_high", above), ("_low", below)):
        metrics[f"actor/clip_fraction{name}"] = mean(count, tokens)
    return loss, shared | metrics | drop_metrics(weight.masked_BT, inputs, ratios.lengths_B)

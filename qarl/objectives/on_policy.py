"""The plain policy gradient, and RLOO."""

from typing import Literal

import torch
from torch import Tensor

from qarl.config.objective import CorrectionConfig, OnPolicyConfig, RLOOConfig
from qarl.metrics import Metrics
from qarl.objectives.aggregate import drop_metrics, reduce, token_sums
from qarl.objectives.corrections import mismatch_weight
from qarl.objectives.ratios import LossInputs, Ratios


def on_policy(inputs: LossInputs, config: OnPolicyConfig) -> tuple[Tensor, Metrics]:
    """REINFORCE (Williams 1992) with one advantage for each sequence; on-policy GRPO when a batch makes one step.

        loss = -(1/num_sequences) sum_b (1/T_b) sum_t w A log pi_theta(y_t)

    `aggregation: token_mean` averages over all tokens instead. Returns and raises as `tbpo`; nothing is clipped.
    """
    return log_prob_loss(inputs, config.correction, config.aggregation)


def rloo(inputs: LossInputs, config: RLOOConfig) -> tuple[Tensor, Metrics]:
    """RLOO (arXiv 2402.14740): the whole response is one action, the others of its group give the baseline.

        A_i = R_i - mean of R_j, j != i    in the group (`advantage.estimator: leave_one_out`)
        loss = -(1/num_sequences) sum_b w A log pi_theta(y)        log pi_theta(y) = sum_t log pi_theta(y_t)

    The paper's KL term in the reward is left out. Returns and raises as `on_policy`.
    """
    return log_prob_loss(inputs, config.correction, "constant")


def log_prob_loss(
    inputs: LossInputs, correction: CorrectionConfig, how: Literal["sequence_mean", "token_mean", "constant"]
) -> tuple[Tensor, Metrics]:
    """The equation of `on_policy` with one of three ways to average, see `qarl.objectives.aggregate.reduce`."""
    ratios = Ratios.of(inputs)
    weight, metrics = mismatch_weight(ratios, correction)
    logp_BT = torch.where(inputs.mask_BT, inputs.logp_theta_BT, 0.0)
    sums_B = token_sums(logp_BT, weight, inputs.mask_BT) * inputs.advantage_B
    loss, shared = reduce(sums_B, inputs, ratios, how)
    return loss, shared | metrics | drop_metrics(weight.masked_BT, inputs, ratios.lengths_B)

"""PPO's clipped minimum on token ratios: GRPO, Dr. GRPO, DAPO and REINFORCE++, which differ in how they average."""

from math import inf
from typing import Literal

from torch import Tensor

from qarl.config.objective import DAPOConfig, DrGRPOConfig, GRPOConfig, ReinforcePPConfig, TokenClip
from qarl.metrics import Metrics
from qarl.objectives.aggregate import drop_metrics, reduce, token_sums
from qarl.objectives.band import Band
from qarl.objectives.corrections import mismatch_weight, upper_clip_bound
from qarl.objectives.ratios import LossInputs, Ratios, bounded_exp


def grpo(inputs: LossInputs, config: GRPOConfig) -> tuple[Tensor, Metrics]:
    """GRPO (arXiv 2402.03300). Its penalty on the KL to a reference model is `kl_coef`, see `regularizers.py`.

        r_t = pi_theta/pi_prox
        loss = -(1/num_sequences) sum_b (1/T_b) sum_t w min(r_t A, clip(r_t, 1-eps_low, 1+eps_high) A)

    `aggregation: token_mean` averages over all tokens of the minibatch instead. `w` is the mismatch weight (1 in the
    paper). `clip_ratio_c` adds an upper bound c on r_t for A < 0 (dual-clip PPO, arXiv 1912.09729). Returns and raises
    as `tbpo`; clip fractions are of tokens.
    """
    return clipped_token_loss(inputs, config, config.aggregation)


def dr_grpo(inputs: LossInputs, config: DrGRPOConfig) -> tuple[Tensor, Metrics]:
    """Dr. GRPO (arXiv 2503.20783): GRPO without its two biases: no division by a response's own length, and no
    standard deviation in the advantage.

        loss = -(1/num_sequences) sum_b (1/L) sum_t w min(r_t A, clip(r_t, 1-eps_low, 1+eps_high) A)

    L is `normalizer`; the paper's equation has 1, its code the generation budget. Returns and raises as `grpo`.
    """
    return clipped_token_loss(inputs, config, "constant", config.normalizer)


def dapo(inputs: LossInputs, config: DAPOConfig) -> tuple[Tensor, Metrics]:
    """DAPO (arXiv 2503.14476): clip-higher and the mean over tokens.

        loss = -(1/num_tokens) sum_b sum_t w min(r_t A, clip(r_t, 1-eps_low, 1+eps_high) A)

    eps_high = 0.28 lets the probability of improbable tokens grow. Dynamic sampling is `train.dynamic_sampling`,
    overlong shaping the reward kind `overlong`. Returns and raises as `grpo`.
    """
    return clipped_token_loss(inputs, config, "token_mean")


def reinforce_pp(inputs: LossInputs, config: ReinforcePPConfig) -> tuple[Tensor, Metrics]:
    """REINFORCE++ (arXiv 2501.03262): no critic, and the advantage is normalized over the batch, not over the group.

        A = (R - mean(R)) / std(R)    over all responses of the step (`advantage.estimator: batch`)
        loss = -(1/num_tokens) sum_b sum_t w min(r_t A, clip(r_t, 1-eps_low, 1+eps_high) A)

    The mean over tokens is our choice. The paper's KL term in each token's reward is left out. Returns and raises as
    `grpo`.
    """
    return clipped_token_loss(inputs, config, "token_mean")


def clipped_token_loss(
    inputs: LossInputs, config: TokenClip, how: Literal["sequence_mean", "token_mean", "constant"], normalizer: int = 1
) -> tuple[Tensor, Metrics]:
    """The equation of `grpo` with one of three ways to average, see `qarl.objectives.aggregate.reduce`."""
    ratios = Ratios.of(inputs)
    weight, metrics = mismatch_weight(ratios, config.correction)
    r_BT = bounded_exp(ratios.log_r_BT)
    band = Band.of(
        r_BT,
        inputs.mask_BT,
        inputs.advantage_B,
        pos_high=upper_clip_bound(1 + config.clip_ratio_high, ratios, config.correction),
        neg_low=1 - config.clip_ratio_low,
        neg_high=config.clip_ratio_c or inf,
    )
    # All tokens of a sequence have one advantage: it may come after the sum.
    sums_B = token_sums(band.clamped(), weight, inputs.mask_BT) * inputs.advantage_B
    loss, shared = reduce(sums_B, inputs, ratios, how, normalizer)
    metrics |= drop_metrics(band.outside_BK | weight.masked_BT, inputs, ratios.lengths_B)
    return loss, shared | metrics | band.clip_metrics(weight.masked_BT)

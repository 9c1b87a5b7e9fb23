"""REINFORCE++ (arXiv 2501.03262)."""

from torch import Tensor

from qarl.config.objective import ReinforcePPConfig
from qarl.metrics import Metrics
from qarl.objectives.grpo import clipped_token_loss
from qarl.objectives.ratios import LossInputs


def reinforce_pp(inputs: LossInputs, config: ReinforcePPConfig) -> tuple[Tensor, Metrics]:
    """PPO's clipped minimum without a critic; the advantage is normalized over the batch, not over the group.

        A = (R - mean(R)) / std(R)    over all responses of the step (`advantage.estimator: batch`)
        loss = -(1/num_tokens) sum_b sum_t w min(r_t A, clip(r_t, 1-eps_low, 1+eps_high) A)

    The mean over tokens is our choice. The paper's KL term in each token's reward is left out. Returns and raises as
    `grpo`.
    """
    return clipped_token_loss(inputs, config, "token_mean")

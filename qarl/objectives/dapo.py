"""DAPO (arXiv 2503.14476)."""

from torch import Tensor

from qarl.config.objective import DAPOConfig
from qarl.metrics import Metrics
from qarl.objectives.grpo import clipped_token_loss
from qarl.objectives.ratios import LossInputs


def dapo(inputs: LossInputs, config: DAPOConfig) -> tuple[Tensor, Metrics]:
    """Clip-higher and the mean over tokens; eps_high = 0.28 lets the probability of improbable tokens grow.

        loss = -(1/num_tokens) sum_b sum_t w min(r_t A, clip(r_t, 1-eps_low, 1+eps_high) A)

    Dynamic sampling is `train.dynamic_sampling`, overlong shaping `advantage.overlong_cache`. Returns and raises as
    `grpo`.
    """
    return clipped_token_loss(inputs, config, "token_mean")

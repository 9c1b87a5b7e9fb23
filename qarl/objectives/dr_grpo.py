"""Dr. GRPO (arXiv 2503.20783)."""

from torch import Tensor

from qarl.config.objective import DrGRPOConfig
from qarl.metrics import Metrics
from qarl.objectives.grpo import clipped_token_loss
from qarl.objectives.ratios import LossInputs


def dr_grpo(inputs: LossInputs, config: DrGRPOConfig) -> tuple[Tensor, Metrics]:
    """GRPO without its two biases: no division by the response's own length, and advantages `R - mean` without std.

        loss = -(1/num_sequences) sum_b (1/L) sum_t w min(r_t A, clip(r_t, 1-eps_low, 1+eps_high) A)

    L is `normalizer`; the paper's equation has 1, its code the generation budget. Returns and raises as `grpo`.
    """
    return clipped_token_loss(inputs, config, "constant", config.normalizer)

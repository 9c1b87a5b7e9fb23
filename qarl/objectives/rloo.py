"""RLOO (arXiv 2402.14740)."""

from torch import Tensor

from qarl.config.objective import RLOOConfig
from qarl.metrics import Metrics
from qarl.objectives.on_policy import log_prob_loss
from qarl.objectives.ratios import LossInputs


def rloo(inputs: LossInputs, config: RLOOConfig) -> tuple[Tensor, Metrics]:
    """REINFORCE; the whole response is one action, the mean reward of the others in its group is the baseline.

        A_i = R_i - mean of R_j, j != i    in the group (`advantage.estimator: leave_one_out`)
        loss = -(1/num_sequences) sum_b w A log pi_theta(y)        log pi_theta(y) = sum_t log pi_theta(y_t)

    The paper's KL term in the reward is left out. Returns and raises as `on_policy`.
    """
    return log_prob_loss(inputs, config.correction, "constant")

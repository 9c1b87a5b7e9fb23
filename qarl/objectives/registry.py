"""The function of each objective. The trainer calls `compute_loss` and does not know which one runs."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from qarl.config import objective as config_of
from qarl.metrics import Metrics
from qarl.objectives.cispo import cispo
from qarl.objectives.custom import custom
from qarl.objectives.gbpo import gbpo
from qarl.objectives.grpo import dapo, dr_grpo, grpo, reinforce_pp
from qarl.objectives.on_policy import on_policy, rloo
from qarl.objectives.ratios import LossInputs
from qarl.objectives.regularizers import regularize
from qarl.objectives.tbpo import gspo, tbpo

OBJECTIVES: dict[type[Any], Callable[[LossInputs, Any], tuple[Tensor, Metrics]]] = {
    config_of.TBPOConfig: tbpo,
    config_of.GRPOConfig: grpo,
    config_of.DrGRPOConfig: dr_grpo,
    config_of.DAPOConfig: dapo,
    config_of.GSPOConfig: gspo,
    config_of.CISPOConfig: cispo,
    config_of.GBPOConfig: gbpo,
    config_of.OnPolicyConfig: on_policy,
    config_of.RLOOConfig: rloo,
    config_of.ReinforcePPConfig: reinforce_pp,
}
"""The built-in objectives."""


def compute_loss(inputs: LossInputs, config: config_of.ObjectiveConfig) -> tuple[Tensor, Metrics]:
    """The loss of a micro-batch, divided by the size of its minibatch, and partial metrics. Raises ObjectiveError."""
    if isinstance(config, config_of.CustomConfig):
        loss, metrics = custom(inputs, config)
    else:
        loss, metrics = OBJECTIVES[type(config)](inputs, config)
    loss, more = regularize(loss, inputs, config)
    return loss, metrics | more

"""The function of each objective. The trainer calls `compute_loss` and does not know which one runs."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from qarl.config.objective import (
    CISPOConfig,
    CustomConfig,
    DAPOConfig,
    DrGRPOConfig,
    GBPOConfig,
    GRPOConfig,
    GSPOConfig,
    ObjectiveConfig,
    OnPolicyConfig,
    ReinforcePPConfig,
    RLOOConfig,
    TBPOConfig,
)
from qarl.metrics import Metrics
from qarl.objectives.cispo import cispo
from qarl.objectives.custom import custom
from qarl.objectives.dapo import dapo
from qarl.objectives.dr_grpo import dr_grpo
from qarl.objectives.gbpo import gbpo
from qarl.objectives.grpo import grpo
from qarl.objectives.gspo import gspo
from qarl.objectives.on_policy import on_policy
from qarl.objectives.ratios import LossInputs
from qarl.objectives.regularizers import regularize
from qarl.objectives.reinforce_pp import reinforce_pp
from qarl.objectives.rloo import rloo
from qarl.objectives.tbpo import tbpo

OBJECTIVES: dict[type[Any], Callable[[LossInputs, Any], tuple[Tensor, Metrics]]] = {
    TBPOConfig: tbpo,
    GRPOConfig: grpo,
    DrGRPOConfig: dr_grpo,
    DAPOConfig: dapo,
    GSPOConfig: gspo,
    CISPOConfig: cispo,
    GBPOConfig: gbpo,
    OnPolicyConfig: on_policy,
    RLOOConfig: rloo,
    ReinforcePPConfig: reinforce_pp,
}
"""The built-in objectives."""


def compute_loss(inputs: LossInputs, config: ObjectiveConfig) -> tuple[Tensor, Metrics]:
    """The loss of a micro-batch, divided by the size of its minibatch, and partial metrics. Raises ObjectiveError."""
    if isinstance(config, CustomConfig):
        loss, metrics = custom(inputs, config)
    else:
        loss, metrics = OBJECTIVES[type(config)](inputs, config)
    loss, more = regularize(loss, inputs, config)
    return loss, metrics | more

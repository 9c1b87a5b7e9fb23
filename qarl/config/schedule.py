"""Progressive precision: which scheme a run uses at which step."""

from qarl.config.policy import RolloutConfig
from qarl.quant.scheme import QuantScheme


def scheme_at(rollout: RolloutConfig, step: int) -> QuantScheme:
    """The scheme that samples and trains step `step` (1 is the first); the last stage that has begun."""
    name, group_size = rollout.scheme, rollout.group_size
    for stage in rollout.schedule:
        if step >= stage.from_step:
            name, group_size = stage.scheme, stage.group_size
    return QuantScheme.of(name, rollout.ignore, group_size)


def schemes_of(rollout: RolloutConfig) -> list[QuantScheme]:
    """Every scheme that the run uses, the first one first."""
    steps = [1, *(stage.from_step for stage in rollout.schedule)]
    return [scheme_at(rollout, step) for step in steps]

"""Who answers and who judges the policy in a run: an environment, or verifiers alone."""

from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path

from launch.run.prompts import tokenizer_of
from qarl.config.run import Config
from qarl.protocols import Fleet, RewardService
from qarl.tasks.turns import TurnEncoder
from rewards.environments.service import EnvironmentRewards, EnvironmentService
from rewards.service import ProcessRewardService
from rollout.conversations import ConversingFleet


def start_rewards(config: Config, on_fault: Callable[[str], None], logs: Path | None) -> RewardService:
    """Verifiers, or with an environment what hands its rewards on. Raises QarlError: a process cannot start."""
    if config.environment.kind == "none":
        return ProcessRewardService(config.reward, on_fault, log_dir=logs)
    return EnvironmentRewards()


def converse(
    config: Config, fleet: Fleet, stack: ExitStack, on_fault: Callable[[str], None], logs: Path | None
) -> Fleet:
    """`fleet`, or with an environment one whose samples are conversations; `stack` ends the environment's processes.

    Raises QarlError: a process cannot start.
    """
    if config.environment.kind == "none":
        return fleet
    environments = stack.enter_context(closing(EnvironmentService(config.environment, on_fault, logs)))
    encoder = TurnEncoder(tokenizer_of(config), config.task)
    return ConversingFleet(fleet, environments, encoder, config.environment.max_turns, config.rollout.max_model_len)

"""Who answers and who judges the policy in a run: an environment, or verifiers alone."""

from collections.abc import Callable
from pathlib import Path

from launch.run.prompts import tokenizer_of
from qarl.config.run import Config
from qarl.protocols import Fleet
from qarl.tasks.turns import TurnEncoder
from rewards.environments.service import EnvironmentRewards, EnvironmentService
from rewards.service import ProcessRewardService
from rollout.conversations import ConversingFleet

Rewards = ProcessRewardService | EnvironmentRewards


def start_rewards(config: Config, on_fault: Callable[[str], None], logs: Path | None) -> Rewards:
    """Verifiers, or environments and what hands their rewards on. Raises ConfigError: a process cannot start."""
    if config.environment.kind == "none":
        return ProcessRewardService(config.reward, on_fault, log_dir=logs)
    return EnvironmentRewards(EnvironmentService(config.environment, on_fault, logs))


def converse(config: Config, fleet: Fleet, rewards: Rewards) -> Fleet:
    """`fleet`, or with the environments of `rewards` one whose samples are conversations."""
    if not isinstance(rewards, EnvironmentRewards):
        return fleet
    encoder, turns = TurnEncoder(tokenizer_of(config), config.task), config.environment.max_turns
    return ConversingFleet(fleet, rewards.environments, encoder, turns, config.rollout.max_model_len)

"""The prompt pool's augmenter, with the validator that the config names."""

from collections.abc import Sequence

from qarl.config.pool import ProgramCheckConfig, VoteConfig
from qarl.config.run import Config
from qarl.prompts.augment import Augmenter
from qarl.prompts.pool import Pool
from qarl.prompts.validate import ProgramCheck, SelfConsistency, Validator
from qarl.tasks.task import Task
from qarl.types import Prompt
from rewards.teacher import Teacher


def make_augmenter(
    config: Config, task: Task, pool: Pool, prompts: Sequence[Prompt], heldout: Sequence[Prompt]
) -> Augmenter | None:
    """None when `pool.augment.per_step` is 0. Raises ConfigError when the teacher's key is not set."""
    if not config.pool.augment.per_step:
        return None
    sampling = config.rollout.sampling
    return Augmenter(
        config.pool.augment,
        pool,
        task,
        _validator(config, task),
        prompts,
        heldout,
        (sampling.temperature, sampling.max_new_tokens),
        config.rollout.max_model_len - sampling.max_new_tokens,
        config.seed,
    )


def _validator(config: Config, task: Task) -> Validator:
    chosen = config.pool.augment.validator
    if isinstance(chosen, ProgramCheckConfig):
        assert task.solve is not None  # the config has checked it
        return ProgramCheck(task.solve)
    return SelfConsistency(chosen) if isinstance(chosen, VoteConfig) else Teacher(chosen)

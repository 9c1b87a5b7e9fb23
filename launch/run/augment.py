"""The prompt pool's augmenter, with the validator that the config names."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from qarl.config.pool import ProgramCheckConfig, VoteConfig
from qarl.config.run import Config
from qarl.prompts.augment import Augmenter
from qarl.prompts.pool import Pool
from qarl.prompts.validate import ProgramCheck, SelfConsistency, Validator
from qarl.tasks import sorting
from qarl.tasks.problems import problems_of
from qarl.types import Prompt
from rewards.teacher import Teacher


def make_augmenter(
    config: Config,
    pool: Pool,
    prompts: Sequence[Prompt],
    heldout: Sequence[Prompt],
    encode: Callable[[str], Sequence[int]],
) -> Augmenter | None:
    """None when `pool.augment.per_step` is 0. Raises ConfigError when the teacher's key is not set."""
    if not config.pool.augment.per_step:
        return None
    sampling = config.rollout.sampling
    return Augmenter(
        config.pool.augment,
        pool,
        problems_of(config.task, encode),
        _validator(config),
        prompts,
        heldout,
        (sampling.temperature, sampling.max_new_tokens),
        config.rollout.max_model_len - sampling.max_new_tokens,
        config.seed,
    )


def _validator(config: Config) -> Validator:
    chosen = config.pool.augment.validator
    if isinstance(chosen, ProgramCheckConfig):
        return ProgramCheck(sorting.solve)  # the only task with a program, as the config has checked
    return SelfConsistency(chosen) if isinstance(chosen, VoteConfig) else Teacher(chosen)

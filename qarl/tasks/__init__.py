"""The problems of a run: training prompts for the pool, held-out prompts for evaluation."""

import re
from collections.abc import Callable, Sequence

from qarl.config.task import TaskConfig
from qarl.tasks.custom import CustomTask
from qarl.tasks.dataset import DatasetTask
from qarl.tasks.reasoning_gym import ReasoningGymTask
from qarl.tasks.sorting import SortingTask
from qarl.tasks.task import NOTHING, Encode, Task

KINDS: dict[str, Callable[..., Task]] = {
    "sorting": SortingTask,
    "dataset": DatasetTask,
    "reasoning_gym": ReasoningGymTask,
    "custom": CustomTask,
}
"""The class of each `task.kind`."""


def no_tokenizer(text: str) -> Sequence[int]:
    """Stands in for an encoder where no prompt is made."""
    raise AssertionError(f"the task was made without a tokenizer, which encodes {text!r}")


def make_task(config: TaskConfig, encode: Encode = no_tokenizer, special: re.Pattern[str] = NOTHING) -> Task:
    """The task that `config` describes; `special` finds the special tokens that no question may hold.

    Raises ConfigError: bad template or generators, or a function that cannot be used.
    """
    return KINDS[config.kind](config, encode, special)

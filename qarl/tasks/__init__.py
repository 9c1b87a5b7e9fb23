"""The problems of a run: training prompts for the pool, held-out prompts for evaluation."""

from collections.abc import Callable, Sequence
from typing import Any

from qarl.config.task import TaskConfig
from qarl.tasks.dataset import DatasetTask
from qarl.tasks.reasoning_gym import ReasoningGymTask
from qarl.tasks.sorting import SortingTask
from qarl.tasks.task import Encode, Task

KINDS: dict[str, Callable[[Any, Encode], Task]] = {
    "sorting": SortingTask,
    "dataset": DatasetTask,
    "reasoning_gym": ReasoningGymTask,
}
"""The class of each `task.kind`."""


def no_tokenizer(text: str) -> Sequence[int]:
    """Stands in for an encoder where no prompt is made."""
    raise AssertionError(f"the task was made without a tokenizer, which encodes {text!r}")


def make_task(config: TaskConfig, encode: Encode = no_tokenizer) -> Task:
    """The task that `config` describes. Raises ConfigError: bad levels, template or generators."""
    return KINDS[config.kind](config, encode)

"""What a kind of task knows of its problems: how a question becomes a prompt and back, what is held out.

A question is the problem itself, without the text that the task's template puts around it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from qarl.config.task import DatasetTaskConfig, SortingTaskConfig
from qarl.errors import ConfigError
from qarl.tasks import dataset, sorting
from qarl.tasks.text import words
from qarl.types import Prompt

Encode = Callable[[str], Sequence[int]]
"""A prompt's text to token ids, chat template and special tokens included."""


class Problems(Protocol):
    """The problems of one task."""

    encode: Encode

    def prompt(self, question: str, answer: str, level: int) -> Prompt:
        """A prompt whose id depends on the question alone."""
        ...

    def question(self, prompt: Prompt) -> str:
        """The question that `prompt` was made of."""
        ...

    def is_well_formed(self, question: str) -> bool: ...

    def is_heldout(self, question: str) -> bool:
        """Whether the task's own rule keeps this question for evaluation."""
        ...

    def heldout_questions(self) -> Iterable[str]:
        """All questions that the task keeps for evaluation, where they are listed and not told by a rule."""
        ...


class SortingProblems:
    """Digits to be sorted."""

    def __init__(self, config: SortingTaskConfig, encode: Encode) -> None:
        self.encode, self._lengths = encode, range(min(config.levels), max(config.levels) + 1)

    def prompt(self, question: str, answer: str, level: int = 0) -> Prompt:
        """The level is the number of digits, whatever `level` says."""
        text = f"{question}="
        return Prompt(f"sorting/{question}", text, answer, tuple(self.encode(text)), len(question))

    def question(self, prompt: Prompt) -> str:
        return prompt.text.removesuffix("=")

    def is_well_formed(self, question: str) -> bool:
        """Digits, as many as the shortest level has, or the longest, or any number between."""
        return re.fullmatch("[0-9]+", question) is not None and len(question) in self._lengths

    def is_heldout(self, question: str) -> bool:
        return sorting.is_heldout(sorting.solve(question))

    def heldout_questions(self) -> Iterable[str]:
        return ()


class DatasetProblems:
    """Rows of files. Raises ConfigError unless the prompt template has `{question}` once."""

    def __init__(self, config: DatasetTaskConfig, encode: Encode) -> None:
        self._config, self.encode = config, encode
        before, found, after = config.prompt_template.partition("{question}")
        if not found or "{question}" in after:
            raise ConfigError("'{question}' does not occur in it once", where="task.prompt_template")
        self._before, self._after = before, after

    def prompt(self, question: str, answer: str, level: int) -> Prompt:
        text = f"{self._before}{question}{self._after}"
        digest = hashlib.sha1(question.encode(), usedforsecurity=False).hexdigest()
        return Prompt(f"row/{digest}", text, answer, tuple(self.encode(text)), level)

    def question(self, prompt: Prompt) -> str:
        return prompt.text.removeprefix(self._before).removesuffix(self._after)

    def is_well_formed(self, question: str) -> bool:
        return bool(words(question))

    def is_heldout(self, question: str) -> bool:
        return False

    def heldout_questions(self) -> Iterable[str]:
        rows = dataset.read_rows(self._config.heldout_path, self._config)
        return (row.question for row in rows)


def problems_of(config: SortingTaskConfig | DatasetTaskConfig, encode: Encode) -> SortingProblems | DatasetProblems:
    """Raises ConfigError: bad levels or template."""
    if isinstance(config, SortingTaskConfig):
        sorting.check_levels(config.levels)
        return SortingProblems(config, encode)
    return DatasetProblems(config, encode)

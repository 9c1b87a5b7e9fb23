"""The problems of a run: training prompts for the pool, held-out prompts for evaluation."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable

from qarl.config.task import DatasetTaskConfig, SortingTaskConfig
from qarl.errors import ConfigError
from qarl.tasks import dataset, sorting
from qarl.tasks.problems import Encode, problems_of
from qarl.types import Prompt

Note = Callable[[str], None]
Problem = tuple[str, str, int]
"""Question, answer, level."""


def load_task(
    config: SortingTaskConfig | DatasetTaskConfig, seed: int, num_heldout: int, encode: Encode, note: Note
) -> tuple[list[Prompt], list[Prompt]]:
    """Training prompts and up to `num_heldout` held-out prompts, disjoint, with ids that are stable across runs.

    Every prefix of the held-out prompts is spread over their levels as evenly as the data allows.

    Args:
        config: which task.
        seed: which problems are generated, or in which order held-out rows are taken.
        num_heldout: held-out prompts wanted; `note` gets a line when there are fewer.
        encode: prompt text to token ids, chat template and special tokens included.
        note: takes one line for the reader of the terminal.

    Raises:
        DataError: a data file or row is wrong.
        ConfigError: bad levels or template, or no problem in one of the splits.
    """
    problems = problems_of(config, encode)
    if isinstance(config, SortingTaskConfig):
        train = _generated(config, config.num_prompts, seed, heldout=False)
        heldout = _generated(config, num_heldout, seed, heldout=True)
        _note_shortage("training", len(train), config.num_prompts, note)
    else:
        train, heldout = _rows(config, seed, num_heldout, note)
    _note_shortage("held-out", len(heldout), num_heldout, note)
    return [problems.prompt(*problem) for problem in train], [problems.prompt(*problem) for problem in heldout]


def _generated(config: SortingTaskConfig, n: int, seed: int, heldout: bool) -> list[Problem]:
    found = sorting.generate(config.levels, n, seed, heldout)
    if not found:
        split = "held-out" if heldout else "training"
        what = f"levels {config.levels} have no {split} problem"
        raise ConfigError(what, where="task.levels", mend="add a longer level")
    return [(digits, sorting.solve(digits), len(digits)) for digits in found]


def _rows(config: DatasetTaskConfig, seed: int, num_heldout: int, note: Note) -> tuple[list[Problem], list[Problem]]:
    train, heldout = dataset.load_rows(config, note)
    random.Random(seed).shuffle(heldout)
    by_level: dict[int, list[dataset.Row]] = defaultdict(list)
    for row in heldout:
        by_level[row.level].append(row)
    chosen = sorting.take_evenly([iter(by_level[level]) for level in sorted(by_level)], num_heldout)
    return [_problem(row) for row in train], [_problem(row) for row in chosen]


def _problem(row: dataset.Row) -> Problem:
    return row.question, row.answer, row.level


def _note_shortage(split: str, found: int, wanted: int, note: Note) -> None:
    if found < wanted:
        note(f"only {found} of {wanted} {split} prompts exist")

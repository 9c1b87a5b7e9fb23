"""The problems of a run: training prompts for the pool, held-out prompts for evaluation."""

from __future__ import annotations

import hashlib
import random
from collections import defaultdict
from collections.abc import Callable, Sequence

from qarl.errors import ConfigError
from qarl.tasks import jsonl, sorting
from qarl.tasks.config import JsonlTaskConfig, SortingTaskConfig
from qarl.types import Prompt

Encode = Callable[[str], Sequence[int]]
Note = Callable[[str], None]


def load_task(
    config: SortingTaskConfig | JsonlTaskConfig, seed: int, num_heldout: int, encode: Encode, note: Note
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
    if isinstance(config, SortingTaskConfig):
        train, heldout = _sorting(config, seed, num_heldout, encode)
        _note_shortage("training", len(train), config.num_prompts, note)
    else:
        train, heldout = _jsonl(config, seed, num_heldout, encode, note)
    _note_shortage("held-out", len(heldout), num_heldout, note)
    return train, heldout


def _sorting(
    config: SortingTaskConfig, seed: int, num_heldout: int, encode: Encode
) -> tuple[list[Prompt], list[Prompt]]:
    def prompts(n: int, heldout: bool) -> list[Prompt]:
        problems = sorting.generate(config.levels, n, seed, heldout)
        if not problems:
            raise ConfigError(
                f"levels {config.levels} have no {'held-out' if heldout else 'training'} problem",
                where="task.levels",
                mend="add a longer level",
            )
        return [
            Prompt(f"sorting/{digits}", f"{digits}=", sorting.solve(digits), tuple(encode(f"{digits}=")), len(digits))
            for digits in problems
        ]

    return prompts(config.num_prompts, False), prompts(num_heldout, True)


def _jsonl(
    config: JsonlTaskConfig, seed: int, num_heldout: int, encode: Encode, note: Note
) -> tuple[list[Prompt], list[Prompt]]:
    def prompt(row: jsonl.Row) -> Prompt:
        text = jsonl.fill_template(config.prompt_template, row.question)
        digest = hashlib.sha1(row.question.encode(), usedforsecurity=False).hexdigest()
        return Prompt(f"jsonl/{digest}", text, row.answer, tuple(encode(text)), row.level)

    train, heldout = jsonl.load_rows(config, note)
    random.Random(seed).shuffle(heldout)
    by_level: dict[int, list[jsonl.Row]] = defaultdict(list)
    for row in heldout:
        by_level[row.level].append(row)
    chosen = sorting.take_evenly([iter(by_level[level]) for level in sorted(by_level)], num_heldout)
    return [prompt(row) for row in train], [prompt(row) for row in chosen]


def _note_shortage(split: str, found: int, wanted: int, note: Note) -> None:
    if found < wanted:
        note(f"only {found} of {wanted} {split} prompts exist")

"""Problems from the rows of files: strict about every row, and no held-out question among the training rows."""

import hashlib
import random
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from qarl.config.task import DatasetTaskConfig
from qarl.errors import DataError
from qarl.tasks.files import raw_rows
from qarl.tasks.task import Encode, Log, Task, log_shortage, split_template, take_evenly
from qarl.tasks.text import plain, words
from qarl.types import Prompt

LARGEST_LEVEL = 2**53
"""Levels are sorted as floats, which are exact up to here."""


class DatasetTask(Task):
    """Rows of files. Raises ConfigError unless the prompt template has `{question}` once."""

    def __init__(self, config: DatasetTaskConfig, encode: Encode) -> None:
        super().__init__(encode)
        self._config = config
        self._before, self._after = split_template(config.prompt_template)

    def load(self, seed: int, num_heldout: int, log: Log) -> tuple[list[Prompt], list[Prompt]]:
        train, heldout = load_rows(self._config, log)
        random.Random(seed).shuffle(heldout)
        by_level: dict[int, list[Row]] = defaultdict(list)
        for row in heldout:
            by_level[row.level].append(row)
        chosen = take_evenly([iter(by_level[level]) for level in sorted(by_level)], num_heldout)
        log_shortage("held-out", len(chosen), num_heldout, log)
        train_prompts, heldout_prompts = (
            [self.prompt(row.question, row.answer, row.level) for row in rows] for rows in (train, chosen)
        )
        return train_prompts, heldout_prompts

    def prompt(self, question: str, answer: str, level: int) -> Prompt:
        text = f"{self._before}{question}{self._after}"
        digest = hashlib.sha1(question.encode(), usedforsecurity=False).hexdigest()
        return Prompt(f"row/{digest}", text, answer, tuple(self.encode(text)), level)

    def question(self, prompt: Prompt) -> str:
        return prompt.text.removeprefix(self._before).removesuffix(self._after)

    def is_well_formed(self, question: str) -> bool:
        return bool(words(question))

    def heldout_questions(self) -> Iterable[str]:
        return (row.question for row in read_rows(self._config.heldout_path, self._config))


@dataclass(frozen=True)
class Row:
    """One problem as the file has it; `level` is 0 without a level key, `where` names its line or row."""

    question: str
    answer: str
    level: int
    where: str

    @property
    def key(self) -> str:
        """Equal for questions with the same words, even when the white space between them differs."""
        return " ".join(self.question.split())


def load_rows(config: DatasetTaskConfig, log: Log) -> tuple[list[Row], list[Row]]:
    """Training and held-out rows in file order, each question once and in one of the two only.

    Repeated questions (the first stays) and training rows whose question is held out, even in another case or
    typography, are dropped; `log` gets a line with their number and the first of them.
    Raises DataError: a file is missing or empty, a row is broken, or no training row is left.
    """
    train = _distinct(read_rows(config.train_path, config), config.train_path, log)
    heldout = _distinct(read_rows(config.heldout_path, config), config.heldout_path, log)
    secret = {plain(key) for key in heldout}  # training rows differ by case: A and a may be two
    leaked = {key: row for key, row in train.items() if plain(key) in secret}
    kept = [row for key, row in train.items() if key not in leaked]
    if leaked:
        first, dropped = next(iter(leaked.values())), len(leaked)
        log(f"{config.train_path}: dropped {dropped} rows whose question is held out, the first is {first.where}")
    if not kept:
        raise DataError(f"every question is also in {config.heldout_path}", where=config.train_path)
    return kept, list(heldout.values())


def read_rows(path: str, config: DatasetTaskConfig) -> list[Row]:
    """The rows of one file. Raises DataError that names the row."""
    columns = {config.question_key, config.answer_key, config.level_key} - {""}
    rows = [_row(values, where, config) for where, values in raw_rows(path, columns)]
    if not rows:
        raise DataError("the file has no rows", where=path)
    return rows


def _row(values: dict[str, Any], where: str, config: DatasetTaskConfig) -> Row:
    question = _text(values, config.question_key, "task.question_key", where)
    answer = _text(values, config.answer_key, "task.answer_key", where)
    if config.answer_delimiter:
        _, found, answer = answer.rpartition(config.answer_delimiter)
        if not found:
            what = f"'{config.answer_key}' has no '{config.answer_delimiter}'"
            raise DataError(what, where, "see task.answer_delimiter")
    if not answer.strip():
        raise DataError("the answer is empty", where=where)
    return Row(question, answer.strip(), _level(values, config.level_key, where), where)


def _text(row: dict[str, Any], key: str, option: str, where: str) -> str:
    value = _value(row, key, option, where)
    if not isinstance(value, str):
        raise DataError(f"'{key}' is {type(value).__name__}, not text", where, "write it as a string")
    if not value.strip():
        raise DataError(f"'{key}' is empty", where=where)
    if not value.isascii() and any("\ud800" <= char <= "\udfff" for char in value):
        raise DataError(f"'{key}' holds half of a surrogate pair, which is no text", where=where)
    return value


def _level(row: dict[str, Any], key: str, where: str) -> int:
    if not key:
        return 0
    value = _value(row, key, "task.level_key", where)
    if not isinstance(value, int) or isinstance(value, bool):
        raise DataError(f"'{key}' is {value!r}, not an integer", where=where)
    if abs(value) > LARGEST_LEVEL:
        raise DataError(f"'{key}' is beyond {LARGEST_LEVEL}", where=where)
    return value


def _value(row: dict[str, Any], key: str, option: str, where: str) -> Any:
    if key not in row:
        raise DataError(f"no key '{key}', the row has {sorted(row)}", where, f"set {option}")
    return row[key]


def _distinct(rows: list[Row], path: str, log: Log) -> dict[str, Row]:
    """The rows by key; of rows with the same key, the first."""
    first: dict[str, Row] = {}
    repeated = [row for row in rows if first.setdefault(row.key, row) is not row]
    if repeated:
        again, before = repeated[0].where, first[repeated[0].key].where
        log(f"{path}: dropped {len(repeated)} rows with a question seen before, the first is {again}, as {before}")
    return first

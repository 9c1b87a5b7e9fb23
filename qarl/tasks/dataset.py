"""Problems from the rows of files: strict about every row, and no held-out question among the training rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from qarl.config.task import DatasetTaskConfig
from qarl.errors import DataError
from qarl.tasks.files import raw_rows
from qarl.tasks.text import plain

LARGEST_LEVEL = 2**53
"""Levels are sorted as floats, which are exact up to here."""


@dataclass(frozen=True)
class Row:
    """One problem as the file has it; `level` is 0 without a level key, `where` names its line or row."""

    question: str
    answer: str
    level: int
    where: str

    @property
    def key(self) -> str:
        """What makes two questions the same: their words, whatever the white space between them."""
        return " ".join(self.question.split())


def load_rows(config: DatasetTaskConfig, note: Callable[[str], None]) -> tuple[list[Row], list[Row]]:
    """Training and held-out rows in file order, each question once and in one of the two only.

    Repeated questions (the first stays) and training rows whose question is held out, in whatever case or typography,
    are dropped; `note` gets a line with their number and the first of them.

    Raises:
        DataError: a file is missing or empty, a row is broken, or no training row is left.
    """
    train = _distinct(read_rows(config.train_path, config), config.train_path, note)
    heldout = _distinct(read_rows(config.heldout_path, config), config.heldout_path, note)
    secret = {plain(key) for key in heldout}  # training rows differ by case: A and a may be two
    leaked = {key: row for key, row in train.items() if plain(key) in secret}
    kept = [row for key, row in train.items() if key not in leaked]
    if leaked:
        first, dropped = next(iter(leaked.values())), len(leaked)
        note(f"{config.train_path}: dropped {dropped} rows whose question is held out, the first is {first.where}")
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
            raise DataError(
                f"'{config.answer_key}' has no '{config.answer_delimiter}'", where, "see task.answer_delimiter"
            )
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


def _distinct(rows: list[Row], path: str, note: Callable[[str], None]) -> dict[str, Row]:
    """The rows by key, the first of equal ones."""
    first: dict[str, Row] = {}
    repeated = [row for row in rows if first.setdefault(row.key, row) is not row]
    if repeated:
        again, before = repeated[0].where, first[repeated[0].key].where
        note(f"{path}: dropped {len(repeated)} rows with a question seen before, the first is {again}, as {before}")
    return first

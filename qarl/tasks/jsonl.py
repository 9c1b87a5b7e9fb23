"""Problems from JSONL files: strict about every row, and no held-out question in the training rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qarl.errors import ConfigError, DataError
from qarl.tasks.config import JsonlTaskConfig


@dataclass(frozen=True)
class Row:
    """One problem as the file has it; `level` is 0 without a level key."""

    question: str
    answer: str
    level: int

    @property
    def key(self) -> str:
        """What makes two questions the same: their words, whatever the white space between them."""
        return " ".join(self.question.split())


def load_rows(config: JsonlTaskConfig, note: Callable[[str], None]) -> tuple[list[Row], list[Row]]:
    """Training and held-out rows in file order, each question once and in one of the two only.

    Repeated questions (the first stays) and training rows whose question is held out are dropped; `note` gets a line
    with their number.

    Raises:
        DataError: a file is missing or empty, a row is broken (`file:line`), or no training row is left.
    """
    train = _distinct(read_rows(config.train_path, config), config.train_path, note)
    heldout = _distinct(read_rows(config.heldout_path, config), config.heldout_path, note)
    held = {row.key for row in heldout}
    kept = [row for row in train if row.key not in held]
    if len(kept) < len(train):
        note(f"{config.train_path}: dropped {len(train) - len(kept)} rows whose question is held out")
    if not kept:
        raise DataError(f"every question is also in {config.heldout_path}", where=config.train_path)
    return kept, heldout


def read_rows(path: str, config: JsonlTaskConfig) -> list[Row]:
    """The rows of one file; blank lines are skipped. Raises DataError with `file:line`."""
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(f"cannot read: {error.strerror}", where=path) from None
    rows = [_parse(line, f"{path}:{i}", config) for i, line in enumerate(lines, start=1) if line.strip()]
    if not rows:
        raise DataError("the file has no rows", where=path)
    return rows


def fill_template(template: str, question: str) -> str:
    """`template` with `{question}` replaced; other braces stay. Raises ConfigError when it has no `{question}`."""
    if "{question}" not in template:
        raise ConfigError("'{question}' does not occur in it", where="task.prompt_template")
    return template.replace("{question}", question)


def _parse(line: bytes, where: str, config: JsonlTaskConfig) -> Row:
    try:
        row = json.loads(line.decode())
    except (ValueError, RecursionError) as error:
        raise DataError(f"not a JSON row: {error}", where=where) from None
    if not isinstance(row, dict):
        raise DataError("a row is a JSON object", where=where)
    question = _text(row, config.question_key, "task.question_key", where)
    answer = _text(row, config.answer_key, "task.answer_key", where)
    if config.answer_delimiter:
        _, found, answer = answer.rpartition(config.answer_delimiter)
        if not found:
            raise DataError(
                f"'{config.answer_key}' has no '{config.answer_delimiter}'", where, "see task.answer_delimiter"
            )
    if not answer.strip():
        raise DataError("the answer is empty", where=where)
    return Row(question, answer.strip(), _level(row, config.level_key, where))


def _text(row: dict[str, Any], key: str, option: str, where: str) -> str:
    value = _value(row, key, option, where)
    if not isinstance(value, str):
        raise DataError(f"'{key}' is {type(value).__name__}, not text", where, "write it as a JSON string")
    if not value.strip():
        raise DataError(f"'{key}' is empty", where=where)
    if any("\ud800" <= char <= "\udfff" for char in value):
        raise DataError(f"'{key}' holds half of a surrogate pair, which is no text", where=where)
    return value


def _level(row: dict[str, Any], key: str, where: str) -> int:
    if not key:
        return 0
    value = _value(row, key, "task.level_key", where)
    if not isinstance(value, int) or isinstance(value, bool):
        raise DataError(f"'{key}' is {value!r}, not an integer", where=where)
    return value


def _value(row: dict[str, Any], key: str, option: str, where: str) -> Any:
    if key not in row:
        raise DataError(f"no key '{key}', the row has {sorted(row)}", where, f"set {option}")
    return row[key]


def _distinct(rows: list[Row], path: str, note: Callable[[str], None]) -> list[Row]:
    first: dict[str, Row] = {}
    for row in rows:
        first.setdefault(row.key, row)
    if len(first) < len(rows):
        note(f"{path}: dropped {len(rows) - len(first)} rows with a question seen before")
    return list(first.values())

"""A problem out of the fields of a row, whatever file or function it is from. Every error names the row."""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import date, time
from decimal import Decimal
from functools import cached_property
from typing import Any

from qarl.config.task import RowConfig
from qarl.errors import DataError
from qarl.tasks.task import Log, Turn

RawRow = tuple[str, Mapping[str, Any]]
"""Where the row is, for messages (`train.jsonl:3`, `train.parquet:row 3`), and its fields."""
LARGEST_LEVEL = 2**53
"""Levels are sorted as floats, which are exact up to here."""
LEVEL = re.compile(r"(?:Level )?(-?[0-9]{1,16})")
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Row:
    """One problem. `turns` stand before the question in a chat; `level` is 0 without a level key."""

    question: str
    answers: tuple[str, ...]
    level: int
    where: str
    turns: tuple[Turn, ...]
    source: str
    metadata: Mapping[str, Any]

    @cached_property
    def key(self) -> str:
        """Equal for questions with the same words, even when the white space between them differs."""
        spoken = [content for role, content in self.turns if role != "system"]
        return " ".join("\n".join([*spoken, self.question]).split())


def read_rows(raw: Iterable[RawRow], title: str, config: RowConfig, log: Log) -> list[Row]:
    """The problems of a file or function called `title`; `log` gets a line when wrong rows are left out.

    Raises DataError that names the first wrong row, when there are more of them than `config` allows.
    """
    rows: list[Row] = []
    wrong: list[DataError] = []
    for where, values in raw:
        try:
            rows.append(_row(values, where, config))
        except DataError as error:
            wrong.append(error)
    if len(wrong) > config.max_wrong_rows:
        first, n = wrong[0], len(wrong)
        hint = f"{n} rows are wrong, which task.max_wrong_rows={n} would leave out" if rows and n > 1 else ""
        raise DataError(first.what, first.where, "; ".join(filter(None, [first.hint, hint]))) from first
    if wrong:
        log(f"{title}: left out {len(wrong)} wrong rows, the first is {wrong[0]}")
    if not rows:
        raise DataError("has no rows", title, "give one that has")
    return rows


def _row(values: Mapping[str, Any], where: str, config: RowConfig) -> Row:
    question, turns = _question(_field(values, "question_key", where, config), where, config)
    answers = _answers(_field(values, "answer_key", where, config), where, config)
    level = _level(_field(values, "level_key", where, config), where, config) if config.level_key else 0
    source = config.source
    if config.source_key:
        source = _text(_field(values, "source_key", where, config), config.source_key, where)
    used = {config.question_key, config.answer_key, config.level_key, config.source_key}
    others = {name: value for name, value in values.items() if name not in used}
    return Row(question, answers, level, where, turns, source, _json(others, where) if others else {})


def _field(row: Mapping[str, Any], option: str, where: str, config: RowConfig) -> Any:
    """The value of the field that the config's `option` names; see `RowConfig`."""
    key = getattr(config, option)
    if key in row:
        return row[key]
    value: Any = row
    for part in key.split("."):
        if isinstance(value, Mapping) and part in value:
            value = value[part]
        elif (
            isinstance(value, list | tuple) and re.fullmatch("-?[0-9]+", part) and -len(value) <= int(part) < len(value)
        ):
            value = value[int(part)]
        else:
            found = sorted(map(str, value)) if isinstance(value, Mapping) else f"{value!r:.40}"
            place = "the row has" if value is row else f"where '{part}' should be, there is"
            raise DataError(f"no key '{key}', {place} {found}", where, f"set task.{option}, or a task.preset")
    return value


def _question(value: Any, where: str, config: RowConfig) -> tuple[str, tuple[Turn, ...]]:
    """The user's last message, and what stands before it."""
    key = config.question_key
    if not isinstance(value, list | tuple):
        return _text(value, key, where), ()
    turns = [_turn(message, f"{key}.{number}", where) for number, message in enumerate(value)]
    has_answer = config.answer_key.startswith(f"{key}.-1.")  # the last message, which is then no part of the prompt
    if has_answer and (not turns or turns.pop()[0] != "assistant"):
        raise DataError(f"'{key}' does not end with a message of the assistant", where, "see task.answer_key")
    if not turns or turns[-1][0] != "user":
        raise DataError(f"'{key}' has no message of the user at its end, to be answered", where)
    if any(role == "system" for role, _ in turns[1:]):
        raise DataError(f"'{key}' has a system message that is not the first", where)
    return turns[-1][1], tuple(turns[:-1])


def _turn(message: Any, key: str, where: str) -> Turn:
    if not isinstance(message, Mapping) or message.get("role") not in ROLES:
        what = f"'{key}' is {message!r:.60}, not a message with `content` and a `role` of {', '.join(ROLES)}"
        raise DataError(what, where)
    return message["role"], _text(message.get("content"), f"{key}.content", where)


def _answers(value: Any, where: str, config: RowConfig) -> tuple[str, ...]:
    """The accepted answers, each once, the reference first."""
    if isinstance(value, list | tuple) and not value:
        raise DataError(f"'{config.answer_key}' is an empty list", where)
    return tuple(
        dict.fromkeys(_answer(one, where, config) for one in (value if isinstance(value, list | tuple) else [value]))
    )


def _answer(value: Any, where: str, config: RowConfig) -> str:
    key = config.answer_key
    if isinstance(value, float) and value.is_integer() and abs(value) <= LARGEST_LEVEL:
        value = int(value)  # columns of whole numbers with gaps become floats
    is_number = type(value) is int or (isinstance(value, float | Decimal) and math.isfinite(value))
    answer = str(value) if is_number else _text(value, key, where)
    if config.answer_delimiter:
        _, found, answer = answer.rpartition(config.answer_delimiter)
        if not found:
            raise DataError(f"'{key}' has no '{config.answer_delimiter}'", where, "see task.answer_delimiter")
    if not answer.strip():
        raise DataError("the answer is empty", where=where)
    return answer.strip()


def _text(value: Any, key: str, where: str) -> str:
    if not isinstance(value, str):
        what = "null" if value is None else type(value).__name__
        raise DataError(f"'{key}' is {what}, not text", where, "write it as a string")
    if not value.strip():
        raise DataError(f"'{key}' is empty", where=where)
    if not value.isascii() and any("\ud800" <= char <= "\udfff" for char in value):
        raise DataError(f"'{key}' holds half of a surrogate pair, which is no text", where=where)
    return value


def _level(value: Any, where: str, config: RowConfig) -> int:
    if isinstance(value, str) and (match := LEVEL.fullmatch(value.strip())):
        value = int(match[1])
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool):
        raise DataError(f"'{config.level_key}' is {value!r:.60}, not an integer", where=where)
    if abs(value) > LARGEST_LEVEL:
        raise DataError(f"'{config.level_key}' is beyond {LARGEST_LEVEL}", where=where)
    return value


def _json(fields: Mapping[str, Any], where: str) -> dict[str, Any]:
    """`fields` as JSON has them: times and decimals become text, bytes null."""
    try:
        plain: dict[str, Any] = json.loads(json.dumps(fields, default=_plain))
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(f"its other fields are not JSON: {error}", where, "leave them out") from error
    return plain


def _plain(value: Any) -> str | None:
    if isinstance(value, date | time | Decimal):  # a datetime is a date
        return str(value)
    if isinstance(value, bytes):
        return None
    raise TypeError(f"{type(value).__name__} {value!r:.60}")

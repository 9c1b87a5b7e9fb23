"""Rows out of files: JSONL, Parquet, and folders that Hugging Face `datasets` saved. What they hold is not judged here.

A row is (where, values): `where` names it for messages, `train.jsonl:3` by line or `train.parquet:row 3`, from 1.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qarl.errors import DataError

RawRow = tuple[str, dict[str, Any]]


def raw_rows(path: str, columns: set[str]) -> Iterator[RawRow]:
    """The rows of `path` in order; of a columnar file only `columns`. Blank lines of JSONL are skipped.

    Raises:
        DataError: the file is missing or not what its name says, a line is no JSON object, or a column is missing.
    """
    try:
        if not Path(path).is_dir() and not path.endswith(".parquet"):
            yield from _lines(path)
            return
        from qarl.tasks.columnar import parquet_rows, saved_rows  # late: pyarrow is slow to import

        read = saved_rows if Path(path).is_dir() else parquet_rows
        yield from read(path, columns)
    except OSError as error:
        what = os.strerror(error.errno) if error.errno else " ".join(str(error).split())
        raise DataError(f"cannot read: {what}", where=path) from None


def json_object(text: bytes, where: str) -> dict[str, Any]:
    """Raises DataError when `text` is anything else."""
    try:
        value = json.loads(text.decode())
    except (ValueError, RecursionError) as error:
        raise DataError(f"not a JSON row: {error}", where=where) from None
    if not isinstance(value, dict):
        raise DataError("a row is a JSON object", where=where)
    return value


def _lines(path: str) -> Iterator[RawRow]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                where = f"{path}:{number}"
                yield where, json_object(line, where)

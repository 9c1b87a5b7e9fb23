"""Rows out of files: JSONL, a JSON array, CSV, Parquet, and folders that Hugging Face `datasets` saved (Arrow streams).

`where` names the row in messages: `train.jsonl:3` by line or `train.parquet:row 3`, from 1. Whoever reads the rows
checks the values. pyarrow is slow to import, so only the functions that need it import it.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qarl.errors import DataError
from qarl.tasks.rows import RawRow

if TYPE_CHECKING:
    import pyarrow

STATE_FILE = "state.json"
"""Of a folder made by `Dataset.save_to_disk`: names the Arrow files."""
SPLITS_FILE = "dataset_dict.json"
"""Of a folder made by `DatasetDict.save_to_disk`: names the splits, each a folder of the other kind."""
BATCH_ROWS = 10_000
BOM = b"\xef\xbb\xbf"


def raw_rows(path: str) -> Iterator[RawRow]:
    """The rows of `path` in order. Blank lines of JSONL and CSV are skipped, and so is a byte order mark.

    Raises DataError: the file is missing or not what its name says, or a row is no object or has other columns.
    """
    try:
        is_folder, suffix = Path(path).is_dir(), Path(path).suffix.lower()
        if not is_folder and suffix == ".arrow":
            raise DataError("a bare Arrow file", path, "name the folder that Dataset.save_to_disk made")
        if not is_folder and suffix != ".parquet":
            yield from (_csv_rows if suffix == ".csv" else _json_rows)(path)
            return
        from pyarrow import ArrowException

        try:
            yield from (_saved_rows if is_folder else _parquet_rows)(path)
        except ArrowException as error:
            raise DataError(f"cannot read: {' '.join(str(error).split())}", where=path) from error
    except (OSError, ValueError) as error:  # ValueError: no UTF-8, a null byte in the name of an Arrow file
        number = getattr(error, "errno", None)
        what = os.strerror(number) if number else " ".join(str(error).split())
        raise DataError(f"cannot read: {what}", where=path) from error


def json_object(text: bytes, where: str) -> dict[str, Any]:
    """Raises DataError when `text` is anything else."""
    value = _json(text, where)
    if not isinstance(value, dict):
        raise DataError("a row is a JSON object", where=where)
    return value


def _json(text: bytes, where: str) -> Any:
    try:
        return json.loads(text.decode())
    except (ValueError, RecursionError) as error:
        raise DataError(f"not a JSON row: {error}", where=where) from error


def _json_rows(path: str) -> Iterator[RawRow]:
    """Of an array, or one a line."""
    with open(path, "rb") as file:
        start = file.read(1000).removeprefix(BOM).lstrip()
        file.seek(0)
        if start.startswith(b"["):
            yield from _array_rows(file.read().removeprefix(BOM), path)
            return
        for number, line in enumerate(file, start=1):
            if number == 1 and line.startswith(b"PAR1"):
                raise DataError("a Parquet file", where=path, hint="give it the suffix .parquet")
            text = line.removeprefix(BOM) if number == 1 else line
            if text.strip():
                where = f"{path}:{number}"
                yield where, json_object(text, where)


def _array_rows(text: bytes, path: str) -> Iterator[RawRow]:
    for number, value in enumerate(_json(text, path), start=1):
        where = f"{path}:row {number}"
        if not isinstance(value, dict):
            raise DataError("a row is a JSON object", where=where)
        yield where, value


def _csv_rows(path: str) -> Iterator[RawRow]:
    """Rows under a line of column names; every value is text."""
    with open(path, encoding="utf-8-sig") as file:  # line ends within a field become \n, too
        lines = csv.reader(file, strict=True)
        try:
            names = next(lines, [])
            if len(set(names)) < len(names):
                raise DataError(f"two columns have one name: {names}", f"{path}:1", "give them names of their own")
            for values in lines:
                where = f"{path}:{lines.line_num}"
                if len(values) not in (0, len(names)):
                    what = f"the row has {len(values)} fields, the first line names {len(names)}"
                    raise DataError(what, where, "put quotes around a text with commas")
                if values:
                    yield where, dict(zip(names, values, strict=True))
        except csv.Error as error:
            raise DataError(f"not CSV: {error}", where=f"{path}:{lines.line_num}") from error


def _parquet_rows(path: str) -> Iterator[RawRow]:
    from pyarrow.parquet import ParquetFile

    with ParquetFile(path) as file:
        yield from _rows(path, file.iter_batches(BATCH_ROWS))


def _saved_rows(path: str) -> Iterator[RawRow]:
    """The rows of a folder that `Dataset.save_to_disk` made."""
    folder = Path(path)
    if (folder / SPLITS_FILE).is_file():
        splits = json_object((folder / SPLITS_FILE).read_bytes(), f"{path}/{SPLITS_FILE}").get("splits")
        raise DataError(f"holds the splits {splits}", where=path, hint=f"name one of them, such as {path}/train")
    if not (folder / STATE_FILE).is_file():
        hint = "make it with Dataset.save_to_disk, or name a file in it"
        raise DataError(f"a folder without {STATE_FILE}, which `datasets` writes", where=path, hint=hint)
    state = json_object((folder / STATE_FILE).read_bytes(), f"{path}/{STATE_FILE}")
    try:
        yield from _rows(path, _batches([folder / file["filename"] for file in state["_data_files"]]))
    except (KeyError, TypeError) as error:
        raise DataError(
            "does not list its Arrow files", f"{path}/{STATE_FILE}", "save it again with Dataset.save_to_disk"
        ) from error


def _batches(files: Iterable[Path]) -> Iterator[pyarrow.RecordBatch]:
    import pyarrow
    import pyarrow.ipc

    for file in files:
        with pyarrow.memory_map(str(file)) as source, pyarrow.ipc.open_stream(source) as stream:
            yield from stream


def _rows(path: str, batches: Iterable[pyarrow.RecordBatch]) -> Iterator[RawRow]:
    number = 0
    for batch in batches:
        names = batch.schema.names
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise DataError(f"has two columns '{twice}'", where=path, hint="give them names of their own")
        for row in range(batch.num_rows):
            number += 1
            where = f"{path}:row {number}"
            try:
                yield where, {name: column[row].as_py() for name, column in zip(names, batch, strict=True)}
            except (ValueError, OverflowError) as error:  # text that is no UTF-8, a time that Python cannot hold
                raise DataError(f"cannot read: {error}", where=where) from error

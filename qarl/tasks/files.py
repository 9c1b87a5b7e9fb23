"""Rows out of files: JSONL, Parquet, and folders that Hugging Face `datasets` saved (Arrow streams).

A row is (where, values); `where` names the row in messages: `train.jsonl:3` by line or `train.parquet:row 3`, from 1.
Whoever reads the rows checks the values. pyarrow is slow to import, so only the functions that need it import it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qarl.errors import DataError

if TYPE_CHECKING:
    import pyarrow

RawRow = tuple[str, dict[str, Any]]
STATE_FILE = "state.json"
"""Of a folder made by `Dataset.save_to_disk`: names the Arrow files."""
SPLITS_FILE = "dataset_dict.json"
"""Of a folder made by `DatasetDict.save_to_disk`: names the splits, each a folder of the other kind."""
BATCH_ROWS = 10_000


def raw_rows(path: str, columns: set[str]) -> Iterator[RawRow]:
    """The rows of `path` in order; only `columns` of Parquet and Arrow files. Blank lines of JSONL are skipped.

    Raises DataError: the file is missing or not what its name says, a line is no JSON object, or a column is missing.
    """
    try:
        is_folder, suffix = Path(path).is_dir(), Path(path).suffix.lower()
        if not is_folder and suffix == ".arrow":
            raise DataError("a bare Arrow file", path, "name the folder that Dataset.save_to_disk made")
        if not is_folder and suffix != ".parquet":
            yield from _lines(path)
            return
        from pyarrow import ArrowException

        try:
            yield from (_saved_rows if is_folder else _parquet_rows)(path, columns)
        except ArrowException as error:
            raise DataError(f"cannot read: {' '.join(str(error).split())}", where=path) from error
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name of an Arrow file
        number = getattr(error, "errno", None)
        what = os.strerror(number) if number else " ".join(str(error).split())
        raise DataError(f"cannot read: {what}", where=path) from error


def json_object(text: bytes, where: str) -> dict[str, Any]:
    """Raises DataError when `text` is anything else."""
    try:
        value = json.loads(text.decode())
    except (ValueError, RecursionError) as error:
        raise DataError(f"not a JSON row: {error}", where=where) from error
    if not isinstance(value, dict):
        raise DataError("a row is a JSON object", where=where)
    return value


def _lines(path: str) -> Iterator[RawRow]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if number == 1 and line.startswith(b"PAR1"):
                raise DataError("a Parquet file", where=path, hint="give it the suffix .parquet")
            if line.strip():
                where = f"{path}:{number}"
                yield where, json_object(line, where)


def _parquet_rows(path: str, columns: set[str]) -> Iterator[RawRow]:
    from pyarrow.parquet import ParquetFile

    with ParquetFile(path) as file:
        _check(file.schema_arrow, columns, path)
        yield from _rows(path, file.iter_batches(BATCH_ROWS, columns=sorted(columns)))


def _saved_rows(path: str, columns: set[str]) -> Iterator[RawRow]:
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
        yield from _rows(path, _batches([folder / file["filename"] for file in state["_data_files"]], columns))
    except (KeyError, TypeError) as error:
        raise DataError("does not list its Arrow files", where=f"{path}/{STATE_FILE}") from error


def _batches(files: Iterable[Path], columns: set[str]) -> Iterator[pyarrow.RecordBatch]:
    import pyarrow
    import pyarrow.ipc

    for file in files:
        with pyarrow.memory_map(str(file)) as source, pyarrow.ipc.open_stream(source) as stream:
            _check(stream.schema, columns, str(file))
            for batch in stream:
                yield batch.select(sorted(columns))


def _rows(path: str, batches: Iterable[pyarrow.RecordBatch]) -> Iterator[RawRow]:
    number = 0
    for batch in batches:
        for row in range(batch.num_rows):
            number += 1
            where = f"{path}:row {number}"
            try:
                yield where, {name: column[row].as_py() for name, column in zip(batch.schema.names, batch, strict=True)}
            except (ValueError, OverflowError) as error:  # text that is no UTF-8, a time that Python cannot hold
                raise DataError(f"cannot read: {error}", where=where) from error


def _check(schema: pyarrow.Schema, columns: set[str], where: str) -> None:
    if missing := columns.difference(schema.names):
        what = f"no column '{min(missing)}', there are {sorted(schema.names)}"
        raise DataError(what, where=where, hint="set task.question_key, task.answer_key or task.level_key")
    if twice := [name for name in columns if schema.names.count(name) > 1]:
        raise DataError(f"has two columns '{min(twice)}'", where=where, hint="give them names of their own")

"""Rows of Parquet files and of folders that Hugging Face `datasets` saved (Arrow streams)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow
import pyarrow.ipc
import pyarrow.parquet

from qarl.errors import DataError
from qarl.tasks.files import RawRow, json_object

STATE_FILE = "state.json"
"""Of a folder made by `Dataset.save_to_disk`: names the Arrow files."""
SPLITS_FILE = "dataset_dict.json"
"""Of a folder made by `DatasetDict.save_to_disk`: names the splits, each a folder of the other kind."""
BATCH_ROWS = 10_000


def parquet_rows(path: str, columns: set[str]) -> Iterator[RawRow]:
    """The rows of a Parquet file. Raises DataError, and OSError when it cannot be opened."""
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _check(file.schema_arrow, columns, path)
            yield from _rows(path, file.iter_batches(BATCH_ROWS, columns=sorted(columns)))
    except pyarrow.ArrowException as error:
        raise _unreadable(path, error) from None


def saved_rows(path: str, columns: set[str]) -> Iterator[RawRow]:
    """The rows of a folder that `Dataset.save_to_disk` made. Raises DataError, and OSError for a missing file."""
    folder = Path(path)
    if (folder / SPLITS_FILE).is_file():
        splits = json_object((folder / SPLITS_FILE).read_bytes(), f"{path}/{SPLITS_FILE}").get("splits")
        raise DataError(f"holds the splits {splits}", where=path, mend=f"name one of them, such as {path}/train")
    if not (folder / STATE_FILE).is_file():
        mend = "make it with Dataset.save_to_disk, or name a file in it"
        raise DataError(f"a folder without {STATE_FILE}, which `datasets` writes", where=path, mend=mend)
    state = json_object((folder / STATE_FILE).read_bytes(), f"{path}/{STATE_FILE}")
    try:
        yield from _rows(path, _batches([folder / file["filename"] for file in state["_data_files"]], columns))
    except (KeyError, TypeError):
        raise DataError("does not list its Arrow files", where=f"{path}/{STATE_FILE}") from None
    except pyarrow.ArrowException as error:
        raise _unreadable(path, error) from None


def _batches(files: Iterable[Path], columns: set[str]) -> Iterator[pyarrow.RecordBatch]:
    for file in files:
        with pyarrow.memory_map(str(file)) as source, pyarrow.ipc.open_stream(source) as stream:
            _check(stream.schema, columns, str(file))
            for batch in stream:
                yield batch.select(sorted(columns))


def _rows(path: str, batches: Iterable[pyarrow.RecordBatch]) -> Iterator[RawRow]:
    number = 0
    for batch in batches:
        for values in batch.to_pylist():
            number += 1
            yield f"{path}:row {number}", values


def _check(schema: pyarrow.Schema, columns: set[str], where: str) -> None:
    if missing := columns.difference(schema.names):
        what = f"no column '{min(missing)}', there are {sorted(schema.names)}"
        raise DataError(what, where=where, mend="set task.question_key, task.answer_key or task.level_key")


def _unreadable(path: str, error: pyarrow.ArrowException) -> DataError:
    return DataError(f"cannot read: {' '.join(str(error).split())}", where=path)

"""Broken data sets: JSONL, Parquet and saved Arrow folders."""

from __future__ import annotations

import datetime
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.campaign.harness import Case, rows

Edit = Callable[[Path], object]
GOOD = rows(100, 63).encode()
PARQUET = ("task.train_path=train.parquet",)
SAVED = ("task.train_path=saved",)
CSV = ("task.train_path=t.csv",)


def jsonl(line: bytes | str) -> Edit:
    """The good training rows with one more, the 64th."""
    data = line if isinstance(line, bytes) else line.encode("utf-8", "surrogatepass")
    return lambda folder: (folder / "train.jsonl").write_bytes(GOOD + data + b"\n")


def row(**values: Any) -> Edit:
    return jsonl(json.dumps({"question": "7=", "answer": "7"} | values))


def levels(value: Any) -> Edit:
    """Rows with a level, the last one `value`."""
    good = "".join(json.dumps({"question": f"{i}=", "answer": "1", "level": i}) + "\n" for i in range(63))
    last = json.dumps({"question": "99=", "answer": "1", "level": value})
    return lambda folder: (folder / "train.jsonl").write_text(good + last)


def table(**columns: Any) -> Any:
    """An Arrow table of 64 rows, with `columns` in place of good ones."""
    import pyarrow

    good = {"question": [f"{i}=" for i in range(64)], "answer": [str(i) for i in range(64)]}
    return pyarrow.table(good | columns)


def parquet(make: Callable[[], Any], name: str = "train.parquet", **options: Any) -> Edit:
    def edit(folder: Path) -> None:
        from pyarrow.parquet import write_table

        write_table(make(), folder / name, **options)

    return edit


def saved(make: Callable[[], Any], name: str = "saved") -> Edit:
    """A folder as `Dataset.save_to_disk` makes it."""

    def edit(folder: Path) -> None:
        import pyarrow

        (folder / name).mkdir()
        made = make()
        with pyarrow.ipc.new_stream(str(folder / name / "data.arrow"), made.schema) as stream:
            stream.write_table(made)
        (folder / name / "state.json").write_text('{"_data_files": [{"filename": "data.arrow"}]}')

    return edit


def then(*edits: Edit) -> Edit:
    return lambda folder: [edit(folder) for edit in edits]


def write(name: str, data: bytes | str) -> Edit:
    raw = data if isinstance(data, bytes) else data.encode()
    return lambda folder: (folder / name).write_bytes(raw)


def cut(name: str, keep: int) -> Edit:
    """The first bytes of a file, or all but the last ones."""
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:keep])


def invalid_text() -> Any:
    """Text columns with bytes that are no UTF-8."""
    import pyarrow

    raw = pyarrow.array([b"\xff\xfe="] * 64, pyarrow.binary())
    buffers = raw.buffers()
    return table(question=pyarrow.Array.from_buffers(pyarrow.string(), 64, buffers))


def typed(kind: str, value: Any) -> Any:
    import pyarrow

    return table(question=pyarrow.array([value] * 64, getattr(pyarrow, kind)()))


def two_columns() -> Any:
    import pyarrow

    good = table()
    return pyarrow.Table.from_arrays([*good.columns, good.column(0)], names=["question", "answer", "question"])


def dictionary() -> Any:
    good = table()
    return good.set_column(0, "question", good.column(0).dictionary_encode())


LINES: list[tuple[str, Edit, tuple[str, ...]]] = [
    ("cut off", jsonl('{"question": "1+2'), ("train.jsonl:64", "JSON")),
    ("a list", jsonl("[1]"), ("train.jsonl:64",)),
    ("a number", jsonl("3"), ("train.jsonl:64",)),
    ("a text", jsonl('"a"'), ("train.jsonl:64",)),
    ("not JSON", jsonl("question: 3"), ("train.jsonl:64", "JSON")),
    ("two objects", jsonl('{"question": "7=", "answer": "7"} {"a": 1}'), ("train.jsonl:64", "JSON")),
    ("a comma at the end", jsonl('{"question": "7=", "answer": "7"},'), ("train.jsonl:64", "JSON")),
    ("NaN", jsonl('{"question": NaN, "answer": "7"}'), ("train.jsonl:64", "question")),
    ("Latin-1", jsonl(b'{"question": "caf\xe9=", "answer": "7"}'), ("train.jsonl:64", "utf-8")),
    ("UTF-16", write("train.jsonl", rows(0, 9).encode("utf-16")), ("train.jsonl:1", "utf-8")),
    ("gzip", write("train.jsonl", b"\x1f\x8b\x08" + bytes(50)), ("train.jsonl:1",)),
    ("null bytes", jsonl(b"\0" * 40), ("train.jsonl:64",)),
    ("deep", jsonl('{"question": ' + "[" * 100_000 + "]" * 100_000 + "}"), ("train.jsonl:64",)),
    ("a surrogate", jsonl('{"question": "\\ud800=", "answer": "7"}'), ("train.jsonl:64", "surrogate")),
    ("a surrogate in the answer", jsonl('{"question": "7=", "answer": "\\udfff"}'), ("train.jsonl:64", "surrogate")),
    ("a raw surrogate", jsonl('{"question": "\ud800=", "answer": "7"}'), ("train.jsonl:64", "utf-8")),
    ("a number of 5,000 digits", jsonl(f'{{"question": {"9" * 5000}, "answer": "7"}}'), ("train.jsonl:64",)),
    ("question missing", jsonl('{"answer": "7"}'), ("train.jsonl:64", "question", "task.question_key")),
    ("answer missing", jsonl('{"question": "7="}'), ("train.jsonl:64", "answer", "task.answer_key")),
    ("question null", row(question=None), ("train.jsonl:64", "question")),
    ("answer true", row(answer=True), ("train.jsonl:64", "answer")),
    ("answer an empty list", row(answer=[]), ("train.jsonl:64", "answer")),
    ("answer a list with null", row(answer=["7", None]), ("train.jsonl:64", "answer", "null")),
    ("question several turns without a chat", row(question=[{"role": "system", "content": "7="}, {"role": "user", "content": "7="}]), ("train.jsonl:64", "task.chat")),
    ("question a turn of a tool", row(question=[{"role": "tool", "content": "7="}]), ("train.jsonl:64", "question.0", "role")),
    ("question turns without text", row(question=[{"role": "user", "content": None}]), ("train.jsonl:64", "question.0.content")),
    ("question no turns", row(question=[]), ("train.jsonl:64", "question")),
    ("question empty", row(question=""), ("train.jsonl:64", "question")),
    ("question white space", row(question=" \n "), ("train.jsonl:64", "question")),
    ("answer white space", row(answer=" "), ("train.jsonl:64", "answer")),
    ("empty file", write("train.jsonl", ""), ("train.jsonl", "no rows")),
    ("blank lines", write("train.jsonl", "\n\n  \n"), ("train.jsonl", "no rows")),
    ("a JSON array, cut off", write("train.jsonl", '[{"question": "7="'), ("train.jsonl", "JSON")),
    ("a JSON array of texts", write("train.jsonl", '["7="]'), ("train.jsonl:row 1",)),
    ("an indented object", write("train.jsonl", '{\n "question": "7="\n}'), ("train.jsonl:1",)),
    ("CSV", write("train.jsonl", "question,answer\n7=,7\n"), ("train.jsonl:1",)),
    ("a folder", then(lambda f: (f / "train.jsonl").unlink(), lambda f: (f / "train.jsonl").mkdir()), ("train.jsonl",)),
    ("missing", lambda f: (f / "train.jsonl").unlink(), ("train.jsonl", "No such file")),
    ("held-out missing", lambda f: (f / "heldout.jsonl").unlink(), ("heldout.jsonl", "No such file")),
    ("held-out empty", write("heldout.jsonl", ""), ("heldout.jsonl", "no rows")),
    ("a link to itself", lambda f: ((f / "train.jsonl").unlink(), (f / "train.jsonl").symlink_to("train.jsonl")), ("train.jsonl",)),
    ("all questions held out", lambda f: shutil.copy(f / "train.jsonl", f / "heldout.jsonl"), ("train.jsonl", "heldout.jsonl")),
    ("every question too long", write("train.jsonl", json.dumps({"question": "1" * 100, "answer": "1"})), ("48 tokens", "rollout.max_model_len")),
    ("two rows for four prompts", write("train.jsonl", rows(1, 2)), ("train.prompts_per_step", "2")),
]  # fmt: skip

LEVELS: list[tuple[str, Any]] = [
    ("text", "hard"),
    ("float", 3.5),
    ("true", True),
    ("null", None),
    ("huge", 10**30),
    ("list", [1]),
]

COLUMNS: list[tuple[str, Edit, tuple[str, ...], tuple[str, ...]]] = [
    ("invalid UTF-8", parquet(invalid_text), PARQUET, ("train.parquet:row 1", "utf-8")),
    ("a time", parquet(lambda: typed("date64", datetime.datetime(2020, 1, 1))), PARQUET, ("train.parquet:row 1", "question")),
    ("a time beyond Python's", parquet(lambda: table(question=_far())), PARQUET, ("train.parquet:row 1", "out of range")),
    ("bytes", parquet(lambda: typed("binary", b"7=")), PARQUET, ("train.parquet:row 1", "question")),
    ("a struct", parquet(lambda: table(question=[{"a": 1}] * 64)), PARQUET, ("train.parquet:row 1", "question")),
    ("a list", parquet(lambda: table(question=[["a"]] * 64)), PARQUET, ("train.parquet:row 1", "question")),
    ("null", parquet(lambda: table(question=[None] * 64)), PARQUET, ("train.parquet:row 1", "question")),
    ("one null", parquet(lambda: table(answer=["1"] * 63 + [None])), PARQUET, ("train.parquet:row 64", "answer")),
    ("two columns of one name", parquet(two_columns), PARQUET, ("train.parquet", "question", "two")),
    ("column missing", parquet(lambda: table().select(["question"])), PARQUET, ("train.parquet", "answer")),
    ("other columns of one name", parquet(lambda: table().append_column("x", [[1] * 64]).append_column("x", [[2] * 64])), PARQUET, ("train.parquet", "two", "x")),
    ("no rows", parquet(lambda: table().slice(0, 0)), PARQUET, ("train.parquet", "no rows")),
    ("cut off", then(parquet(table), cut("train.parquet", -100)), PARQUET, ("train.parquet",)),
    ("cut at the start", then(parquet(table), cut("train.parquet", 10)), PARQUET, ("train.parquet",)),
    ("empty file", write("train.parquet", ""), PARQUET, ("train.parquet",)),
    ("JSONL within", write("train.parquet", GOOD), PARQUET, ("train.parquet",)),
    ("damaged page", then(parquet(table, compression="zstd"), lambda f: _flip(f / "train.parquet")), PARQUET, ("train.parquet",)),
    ("upper case, cut off", then(parquet(table, "T.PARQUET"), cut("T.PARQUET", -100)), ("task.train_path=T.PARQUET",), ("T.PARQUET",)),
    ("Parquet named .jsonl", parquet(table, "train.jsonl"), (), ("train.jsonl", "Parquet")),
    ("Arrow file", then(saved(table), lambda f: shutil.copy(f / "saved/data.arrow", f / "a.arrow")), ("task.train_path=a.arrow",), ("a.arrow", "folder")),
    ("saved, invalid UTF-8", saved(invalid_text), SAVED, ("saved:row 1", "utf-8")),
    ("saved, two columns of one name", saved(two_columns), SAVED, ("saved", "question", "two")),
    ("saved, no state.json", then(saved(table), lambda f: (f / "saved/state.json").unlink()), SAVED, ("saved", "state.json")),
    ("saved, state cut off", then(saved(table), cut("saved/state.json", 10)), SAVED, ("state.json",)),
    ("saved, state a list", then(saved(table), write("saved/state.json", "[]")), SAVED, ("state.json",)),
    ("saved, state without files", then(saved(table), write("saved/state.json", "{}")), SAVED, ("state.json",)),
    ("saved, files no list", then(saved(table), write("saved/state.json", '{"_data_files": 3}')), SAVED, ("state.json",)),
    ("saved, file name a number", then(saved(table), write("saved/state.json", '{"_data_files": [{"filename": 3}]}')), SAVED, ("state.json",)),
    ("saved, file name with a null byte", then(saved(table), write("saved/state.json", '{"_data_files": [{"filename": "a\\u0000"}]}')), SAVED, ("saved",)),
    ("saved, arrow missing", then(saved(table), lambda f: (f / "saved/data.arrow").unlink()), SAVED, ("saved",)),
    ("saved, arrow empty", then(saved(table), write("saved/data.arrow", "")), SAVED, ("saved",)),
    ("saved, arrow cut off", then(saved(table), cut("saved/data.arrow", -200)), SAVED, ("saved",)),
    ("saved, splits", then(saved(table), write("saved/dataset_dict.json", '{"splits": ["train", "test"]}')), SAVED, ("saved/train",)),
    ("saved, splits a number", then(saved(table), write("saved/dataset_dict.json", "3")), SAVED, ("dataset_dict.json",)),
    ("an empty folder", lambda f: (f / "saved").mkdir(), SAVED, ("saved", "state.json")),
    ("CSV, a field too many", write("t.csv", "question,answer\n7=,7,7\n"), CSV, ("t.csv:2", "3 fields")),
    ("CSV, an open quote", write("t.csv", 'question,answer\n"7=,7\n'), CSV, ("t.csv", "CSV")),
    ("CSV, Latin-1", write("t.csv", b"question,answer\ncaf\xe9,7\n"), CSV, ("t.csv", "utf-8")),
    ("CSV, semicolons", write("t.csv", "question;answer\n7=;7\n"), CSV, ("t.csv:2", "task.question_key")),
]  # fmt: skip

RIGHT: list[tuple[str, Edit, tuple[str, ...], tuple[str, ...]]] = [
    ("dictionary-encoded text", parquet(dictionary), PARQUET, ()),
    ("upper-case suffix", parquet(table, "T.PARQUET"), ("task.train_path=T.PARQUET",), ()),
    ("upper-case .JSONL", lambda f: (f / "train.jsonl").rename(f / "T.JSONL"), ("task.train_path=T.JSONL",), ()),
    ("a saved folder", saved(table), SAVED, ()),
    ("blank lines between", jsonl("\n\n" + json.dumps({"question": "7=", "answer": "7"})), (), ()),
    ("a question twice", row(question="100="), (), ("dropped 1",)),
    ("a question that is held out", row(question="1000="), (), ("dropped 1",)),
    ("windows line ends", lambda f: (f / "train.jsonl").write_bytes(GOOD.replace(b"\n", b"\r\n")), (), ()),
    ("no line end at the end", lambda f: (f / "train.jsonl").write_bytes(GOOD.rstrip()), (), ()),
    ("more keys", row(extra={"a": [1, None]}), (), ()),
    ("a byte order mark", write("train.jsonl", b"\xef\xbb\xbf" + GOOD), (), ()),
    ("a JSON array", lambda f: (f / "train.jsonl").write_text(json.dumps([json.loads(line) for line in GOOD.splitlines()])), (), ()),
    ("answer a number", row(answer=7), (), ()),
    ("answers in a list", row(answer=["7", 7.0]), (), ()),
    ("question a turn", row(question=[{"role": "user", "content": "7="}]), (), ()),
    ("a wrong row that may be left out", row(answer=None), ("task.max_wrong_rows=1",), ("left out 1",)),
    ("other columns of times and bytes", parquet(lambda: table(at=[datetime.date(2020, 1, 1)] * 64, raw=[b"x"] * 64)), PARQUET, ()),
    ("CSV", write("t.csv", "question,answer\r\n" + "".join(f'"{i}=",{i}\r\n' for i in range(64))), CSV, ()),
    ("a folder called .parquet", saved(table, "d.parquet"), ("task.train_path=d.parquet",), ()),
]  # fmt: skip


def _far() -> Any:
    import pyarrow

    return pyarrow.array([2**62] * 64, pyarrow.int64()).cast(pyarrow.timestamp("us"), safe=False)


def _flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[40:80] = bytes(byte ^ 255 for byte in data[40:80])
    file.write_bytes(data)


CASES = [
    *(Case("JSONL", name, words, edit=edit) for name, edit, words in LINES),
    *(Case("level", name, ("train.jsonl:64", "level"), ("task.level_key=level",), levels(value)) for name, value in LEVELS),
    *(Case("Parquet and Arrow", name, words, settings, edit) for name, edit, settings, words in COLUMNS),
    *(Case("good data", name, words, settings, edit, is_good=True) for name, edit, settings, words in RIGHT),
]  # fmt: skip

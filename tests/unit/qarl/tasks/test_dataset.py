"""Rows of files: the split never leaks, every format gives the same problems, and bad rows are named by line."""

from __future__ import annotations

import csv
import hashlib
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from qarl.config.task import DatasetTaskConfig
from qarl.errors import ConfigError, DataError
from qarl.tasks import make_task
from qarl.tasks.dataset import Part, _distinct, mix, read_file
from qarl.tasks.files import raw_rows
from qarl.tasks.rows import Row
from qarl.tasks.task import shares
from qarl.types import Prompt
from tests.support.task_rows import config_of, qa, quiet, write

Notes = list[str]
SAVED = str(Path(__file__).parents[3] / "data" / "saved_dataset")


def encode(text: str, turns: Any = ()) -> list[int]:
    return [ord(char) for char in "".join([*(content for _, content in turns), text])]


def load(
    config: DatasetTaskConfig, log: Callable[[str], None] = quiet, n: int = 1
) -> tuple[list[Prompt], list[Prompt]]:
    return make_task(config, encode).load(0, n, log)


def read(path: object, **keys: Any) -> list[Row]:
    return read_file(DatasetTaskConfig(train_path=str(path), heldout_path="h", **keys).train_path[0], quiet)


def test_load_rows(tmp_path: Path) -> None:
    row = {"q": "2+2? {x}", "a": "work #### 3, no #### 4\n", "hard": 2}
    config = config_of(
        tmp_path,
        [row],
        [{**row, "q": "3+3?"}],
        question_key="q",
        answer_key="a",
        level_key="hard",
        answer_delimiter="####",
        prompt_template="Solve {question} in \\boxed{}.",
    )
    notes: Notes = []
    (train,), (heldout,) = make_task(config, encode).load(0, 1, notes.append)
    assert (train.text, train.answer, train.level) == ("Solve 2+2? {x} in \\boxed{}.", "4", 2)
    assert train.token_ids == tuple(encode(train.text))
    # sha1 of the question: ids in checkpoints must not change.
    assert train.id == "row/399fc8f2fc6c943d400e18f65a82c46c5189e3ee"
    assert heldout.text == "Solve 3+3? in \\boxed{}."
    assert notes == []


def test_duplicates_and_heldout_questions_leave_the_pool(tmp_path: Path) -> None:
    config = config_of(tmp_path, qa("a", "b", "a", "c", " b "), qa("c", "d", "d"))
    notes: Notes = []
    train, heldout = make_task(config, encode).load(0, 2, notes.append)
    assert [p.text for p in train] == ["a", "b"]
    assert sorted(p.text for p in heldout) == ["c", "d"]
    assert [note.replace(str(tmp_path), "") for note in notes] == [
        "/train.jsonl: dropped 2 rows with a question seen before, the first is /train.jsonl:3, as /train.jsonl:1",
        "/heldout.jsonl: dropped 1 rows with a question seen before, the first is "
        "/heldout.jsonl:3, as /heldout.jsonl:2",
        "/train.jsonl: dropped 1 rows whose question is held out, the first is /train.jsonl:4",
    ]


@pytest.mark.parametrize("question", ["WHAT IS 2+2?", "What  is 2+2?", "\uff37hat is 2+2?", "What is\u200b 2+2?"])
def test_a_question_is_heldout_in_any_case_and_typography(tmp_path: Path, question: str) -> None:
    notes: Notes = []
    config = config_of(tmp_path, qa("a", question, "A"), qa("What is 2+2?"))
    train, _ = make_task(config, encode).load(0, 1, notes.append)
    assert [p.text for p in train] == ["a", "A"]  # among training rows, case tells questions apart
    assert notes == [
        f"{tmp_path}/train.jsonl: dropped 1 rows whose question is held out, the first is {tmp_path}/train.jsonl:2"
    ]


def test_a_question_is_heldout_even_when_evaluation_does_not_take_it(tmp_path: Path) -> None:
    config = config_of(tmp_path, qa("a", "b", "c", "d"), qa("a", "b", "c"))
    train, heldout = make_task(config, encode).load(0, 1, quiet)
    assert ([p.text for p in train], len(heldout)) == (["d"], 1)


def test_heldout_rows_are_taken_evenly_over_levels(tmp_path: Path) -> None:
    rows = qa(*"abcdefgh", level=1) + qa("i", level=2) + qa(*"jklm", level=3)
    config = config_of(tmp_path, qa("z", level=1), rows, level_key="level")
    _, heldout = make_task(config, encode).load(0, 7, quiet)
    assert Counter(p.level for p in heldout) == {1: 3, 2: 1, 3: 3}


GOOD = b'{"question": "q", "answer": "1"}\n'
BAD_ROWS = {
    b'{"question": "q", "answer": ': "not a JSON row",
    b"[1, 2]": "a row is a JSON object",
    b'{"answer": "1"}': "no key 'question', the row has ['answer']; set task.question_key",
    b'{"question": "q"}': "no key 'answer'",
    b'{"question": 5, "answer": "1"}': "'question' is int, not text",
    b'{"question": "q", "answer": true}': "'answer' is bool, not text",
    b'{"question": "q", "answer": NaN}': "'answer' is float, not text",
    b'{"question": "q", "answer": {}}': "'answer' is dict, not text",
    b'{"question": "q", "answer": []}': "'answer' is an empty list",
    b'{"question": "q", "answer": ["1", null]}': "'answer' is null, not text",
    b'{"question": [], "answer": "1"}': "'question' has no message of the user at its end",
    b'{"question": ["q"], "answer": "1"}': "'question.0' is 'q', not a message with `content` and a `role` of system",
    b'{"question": [{"role": "tool", "content": "q"}], "answer": "1"}': "'question.0' is {'role': 'tool'",
    b'{"question": [{"role": "user"}], "answer": "1"}': "'question.0.content' is null, not text",
    b'{"question": [{"role": "assistant", "content": "q"}], "answer": "1"}': "'question' has no message of the user",
    b'{"question": [{"role": "user", "content": "q"}, {"role": "system", "content": "s"},'
    b' {"role": "user", "content": "q"}], "answer": "1"}': "'question' has a system message that is not the first",
    b'{"question": " ", "answer": "1"}': "'question' is empty",
    b'{"question": "q", "answer": " "}': "'answer' is empty",
    b'{"question": "\\ud800", "answer": "1"}': "surrogate",
    b'{"question": "\xff", "answer": "1"}': "not a JSON row",
    b"[" * 100_000: "not a JSON row",
}


@pytest.mark.parametrize(("row", "fault"), list(BAD_ROWS.items()), ids=lambda value: str(value)[:24])
def test_a_bad_row_is_named_by_file_and_line(tmp_path: Path, row: bytes, fault: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD + b"\n" + row + b"\n" + GOOD)
    with pytest.raises(DataError) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}:3: ")
    assert fault in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("keys", "row", "fault"),
    [
        ({"answer_delimiter": "####"}, {"answer": "4"}, "'answer' has no '####'; see task.answer_delimiter"),
        ({"answer_delimiter": "####"}, {"answer": "4 #### "}, "the answer is empty"),
        ({"level_key": "level"}, {"answer": "4"}, "no key 'level'"),
        ({"level_key": "level"}, {"answer": "4", "level": "hard"}, "'level' is 'hard', not an integer"),
        ({"level_key": "level"}, {"answer": "4", "level": 10**400}, "'level' is beyond 9007199254740992"),
        ({"level_key": "level"}, {"answer": "4", "level": True}, "'level' is True, not an integer"),
        ({"level_key": "level"}, {"answer": "4", "level": "Level ?"}, "'level' is 'Level ?', not an integer"),
        ({"level_key": "level"}, {"answer": "4", "level": 2.5}, "'level' is 2.5, not an integer"),
        ({"source_key": "from"}, {"answer": "4", "from": 1}, "'from' is int, not text"),
        (
            {"answer_key": "a.b"},
            {"a": {"c": 1}},
            "no key 'a.b', where 'b' should be, there is ['c']; set task.answer_key, or a task.preset",
        ),
        ({"answer_key": "a.1"}, {"a": [1]}, "no key 'a.1', where '1' should be, there is [1]"),
        ({"answer_key": "a.b"}, {"a": 5}, "no key 'a.b', where 'b' should be, there is 5"),
        ({"preset": "verl"}, {}, "no key 'prompt', the row has ['question']; set task.question_key, or a task.preset"),
        (
            {"preset": "openai_chat"},
            {"messages": [{"role": "user", "content": "q"}]},
            "'messages' does not end with a message of the assistant",
        ),
    ],
)
def test_a_row_that_the_options_do_not_fit(
    tmp_path: Path, keys: dict[str, Any], row: dict[str, Any], fault: str
) -> None:
    config = config_of(tmp_path, [{"question": "q", **row}], qa("h"), **keys)
    with pytest.raises(DataError) as caught:
        load(config)
    assert str(caught.value).startswith(f"{config.train_path[0].path}:1: {fault}")


def test_files_without_rows(tmp_path: Path) -> None:
    config = config_of(tmp_path, [], qa("a"))
    with pytest.raises(DataError, match="no rows"):
        load(config)
    Path(config.train_path[0].path).unlink()
    with pytest.raises(DataError, match="cannot read: No such file"):
        load(config)
    with pytest.raises(DataError, match=r"every question is also in .*heldout\.jsonl"):
        load(config_of(tmp_path, qa("a"), qa("a")))


@pytest.mark.parametrize("template", ["Hello", "{question}, again: {question}"])
def test_a_template_holds_the_question_once(tmp_path: Path, template: str) -> None:
    with pytest.raises(ConfigError, match=r"task\.prompt_template"):
        make_task(config_of(tmp_path, qa("a"), qa("b"), prompt_template=template), encode).load(0, 1, quiet)


@given(st.text(), st.text(), st.text())
def test_a_prompt_holds_its_question_and_every_other_character(before: str, question: str, after: str) -> None:
    template = f"{before}{{question}}{after}"
    if template.count("{question}") != 1:
        return
    config = DatasetTaskConfig(train_path="t", heldout_path="h", prompt_template=template)
    task = make_task(config, lambda text: [])
    prompt = task.prompt(question, "4", 7)
    assert prompt.text == before + question + after
    assert (task.question(prompt), prompt.answer, prompt.level) == (question, "4", 7)


# --- Parquet and saved datasets

ROWS = [{"question": f"{n}+1?", "answer": str(n + 1), "level": n, "other": [n]} for n in range(5)]


def parquet(path: Path, rows: list[Any]) -> str:
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
    return str(path)


def test_parquet_rows_are_those_of_jsonl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qarl.tasks.files.BATCH_ROWS", 2)
    path = parquet(tmp_path / "rows.parquet", ROWS)
    rows = read(path, level_key="level")
    lines = read(write(tmp_path / "rows.jsonl", ROWS), level_key="level")
    assert [(r.question, *r.answers, r.level) for r in rows] == [(r.question, *r.answers, r.level) for r in lines]
    assert [r.where for r in rows] == [f"{path}:row {i}" for i in range(1, 6)]


def test_a_folder_that_datasets_saved() -> None:
    """`tests/data/saved_dataset` was written by `datasets` 5.2.0, in two shards."""
    rows = read(SAVED, level_key="level")
    assert [(r.question, *r.answers, r.level) for r in rows] == [
        ("What is 2+2?", "4", 1),
        ("What is 2+3?", "5", 2),
        ("Was ist 2+4?", "6", 3),
    ]
    assert rows[-1].where == f"{SAVED}:row 3"


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({"question": None}, "'question' is null, not text"),
        ({"question": " "}, "'question' is empty"),
        ({"answer": None}, "'answer' is null, not text"),
        ({"level": None}, "'level' is None, not an integer"),
    ],
)
def test_a_bad_row_of_parquet_is_named_by_its_number(tmp_path: Path, row: dict[str, Any], fault: str) -> None:
    path = parquet(tmp_path / "rows.parquet", [*ROWS[:3], {**ROWS[3], **row}, ROWS[4]])
    with pytest.raises(DataError) as caught:
        read(path, level_key="level")
    assert str(caught.value).startswith(f"{path}:row 4: {fault}")


def test_columns_that_are_missing_or_of_another_type(tmp_path: Path) -> None:
    path = parquet(tmp_path / "rows.parquet", [{"q": "2+2?", "answer": [4]}])
    with pytest.raises(DataError, match=r"no key 'question', the row has \['answer', 'q'\]; set task.question_key"):
        read(path)
    with pytest.raises(DataError, match=r"row 1: 'answer' is dict, not text"):
        read(parquet(tmp_path / "rows.parquet", [{"q": "2+2?", "answer": {"a": 1}}]), question_key="q")
    with pytest.raises(DataError, match="no key 'questions'"):
        read(SAVED, question_key="questions")


def test_files_that_are_not_what_they_seem(tmp_path: Path) -> None:
    def fault(path: Path) -> str:
        with pytest.raises(DataError) as caught:
            read(path, level_key="level")
        assert str(caught.value).startswith(str(path))
        return caught.value.what

    assert "No such file" in fault(tmp_path / "none.parquet")
    (tmp_path / "text.parquet").write_text("question,answer")
    assert fault(tmp_path / "text.parquet").startswith("cannot read: ")
    whole = Path(parquet(tmp_path / "rows.parquet", ROWS)).read_bytes()
    (tmp_path / "damaged.parquet").write_bytes(whole[:10] + b"\xff" * 60 + whole[70:])
    assert "\n" not in fault(tmp_path / "damaged.parquet")
    assert fault(tmp_path) == "a folder without state.json, which `datasets` writes"
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert fault(tmp_path) == "holds the splits ['train', 'test']"
    for state, expected in [
        ("{", "not a JSON row"),
        ("{}", "does not list its Arrow files"),
        ('{"_data_files": [{"filename": "no"}]}', "cannot read: No such file"),
        ('{"_data_files": [{"filename": "state.json"}]}', "cannot read: "),
    ]:
        folder = tmp_path / f"saved{len(expected)}"
        folder.mkdir()
        (folder / "state.json").write_text(state)
        assert fault(folder).startswith(expected)


def arrow_table(**columns: Any) -> Any:
    return pa.table({"question": ["1", "2"], "answer": ["1", "2"]} | columns)


def not_utf8() -> Any:
    raw = pa.array([b"1", b"\xff\xfe"], pa.binary())
    return arrow_table(question=pa.Array.from_buffers(pa.string(), 2, raw.buffers()))


def late_times() -> Any:
    return arrow_table(question=pa.array([0, 2**62], pa.int64()).cast(pa.timestamp("us"), safe=False))


def two_questions() -> Any:
    return pa.Table.from_arrays([*arrow_table().columns] * 2, names=["question", "answer", "question", "x"])


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (not_utf8, "row 2: cannot read: 'utf-8' codec"),
        (late_times, "row 2: cannot read: "),
        (two_questions, "has two columns 'question'"),
    ],
)
@pytest.mark.parametrize("kind", ["parquet", "PARQUET", "saved"])
def test_what_arrow_cannot_hand_on_names_its_row(
    tmp_path: Path, make: Callable[[], Any], reason: str, kind: str
) -> None:
    path = tmp_path / f"rows.{kind}"
    if kind == "saved":
        path.mkdir()
        with pa.ipc.new_stream(str(path / "a.arrow"), make().schema) as stream:
            stream.write_table(make())
        (path / "state.json").write_text('{"_data_files": [{"filename": "a.arrow"}]}')
    else:
        pq.write_table(make(), path)
    with pytest.raises(DataError) as caught:
        list(raw_rows(str(path)))
    assert reason in str(caught.value)
    assert str(path) in str(caught.value)


def test_the_suffix_says_what_a_file_is(tmp_path: Path) -> None:
    pq.write_table(arrow_table(), tmp_path / "rows.Parquet")
    assert len(list(raw_rows(str(tmp_path / "rows.Parquet")))) == 2
    (tmp_path / "rows.Parquet").rename(tmp_path / "rows.jsonl")
    with pytest.raises(DataError, match=r"a Parquet file; give it the suffix \.parquet"):
        list(raw_rows(str(tmp_path / "rows.jsonl")))


# --- formats, presets, several files

THREE = [("What is 2 + 2?", "4"), ('Say "a, b"\nor c', "5.5"), ("Grüße, 3 · 7?", "21")]


def verl_rows() -> list[dict[str, Any]]:
    return [
        {
            "data_source": "sums",
            "prompt": [{"role": "user", "content": question}],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": answer},
            "extra_info": {"index": index, "split": "train"},
        }
        for index, (question, answer) in enumerate(THREE)
    ]


def openai_rows() -> list[dict[str, Any]]:
    return [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        for question, answer in THREE
    ]


def plain_rows(question: str = "question", answer: str = "answer", **more: Any) -> list[dict[str, Any]]:
    return [{question: q, answer: a, **more} for q, a in THREE]


def lines(rows: list[dict[str, Any]], start: str = "", end: str = "\n") -> str:
    return start + "".join(json.dumps(row) + end for row in rows)


def as_csv(path: Path, end: str = "\r\n", encoding: str = "utf-8") -> None:
    with path.open("w", newline="", encoding=encoding) as file:
        csv.writer(file, lineterminator=end).writerows(
            [["question", "answer"], *((q.replace("\n", end), a) for q, a in THREE)]
        )


def as_folder(path: Path, rows: list[dict[str, Any]]) -> None:
    """As `Dataset.save_to_disk` writes it."""
    path.mkdir()
    table = pa.Table.from_pylist(rows)
    with pa.ipc.new_stream(str(path / "data-0.arrow"), table.schema) as stream:
        stream.write_table(table)
    (path / "state.json").write_text('{"_data_files": [{"filename": "data-0.arrow"}]}')


FORMATS: list[tuple[str, Callable[[Path], object], dict[str, Any]]] = [
    ("rows.jsonl", lambda path: path.write_text(lines(plain_rows())), {}),
    ("crlf.jsonl", lambda path: path.write_bytes(lines(plain_rows(), end="\r\n").encode()), {}),
    ("bom.jsonl", lambda path: path.write_text(lines(plain_rows(), start="\ufeff"), "utf-8"), {}),
    ("rows.json", lambda path: path.write_text(json.dumps(plain_rows(), indent=2)), {}),
    ("bom.json", lambda path: path.write_text("\ufeff\n " + json.dumps(plain_rows()), "utf-8"), {}),
    ("lines.json", lambda path: path.write_text(lines(plain_rows())), {}),
    ("rows.csv", as_csv, {}),
    ("lf.CSV", lambda path: as_csv(path, "\n"), {}),
    ("bom.csv", lambda path: as_csv(path, encoding="utf-8-sig"), {}),
    ("rows.parquet", lambda path: parquet(path, plain_rows()), {}),
    ("folder", lambda path: as_folder(path, plain_rows()), {}),
    (
        "gsm8k.jsonl",
        lambda path: write(path, [{"question": q, "answer": f"So ####\n#### {a}"} for q, a in THREE]),
        {"preset": "gsm8k"},
    ),
    (
        "math.json",
        lambda path: path.write_text(json.dumps(plain_rows("problem", level="Level 0", type="Algebra"))),
        {"preset": "math"},
    ),
    ("verl.parquet", lambda path: parquet(path, verl_rows()), {"preset": "verl", "source_key": ""}),
    ("verl.jsonl", lambda path: write(path, verl_rows()), {"preset": "verl", "source_key": ""}),
    ("chat.jsonl", lambda path: write(path, openai_rows()), {"preset": "openai_chat"}),
    (
        "nested.jsonl",
        lambda path: write(path, [{"a": [{"q": q}], "b.c": a} for q, a in THREE]),
        {"question_key": "a.0.q", "answer_key": "b.c"},
    ),
    (
        "accepted.jsonl",
        lambda path: write(path, [{"question": q, "answer": [a, a]} for q, a in THREE]),
        {},
    ),
    (
        "numbers.jsonl",
        lambda path: write(path, [{"question": q, "answer": float(a)} for q, a in THREE]),
        {},
    ),
]


@pytest.mark.parametrize(("name", "make", "keys"), FORMATS, ids=[name for name, _, _ in FORMATS])
def test_every_format_and_preset_gives_equal_prompts(
    tmp_path: Path, name: str, make: Callable[[Path], object], keys: dict[str, Any]
) -> None:
    make(tmp_path / name)
    held = {"path": write(tmp_path / "held.jsonl", qa("z")), "preset": None}
    held |= {"question_key": "question", "answer_key": "answer", "answer_delimiter": "", "level_key": ""}
    config = DatasetTaskConfig(
        train_path=str(tmp_path / name), heldout_path=held, prompt_template="Q: {question}", **keys
    )
    train, _ = load(config)
    assert train == [
        Prompt(prompt_id, f"Q: {question}", answer, tuple(encode(f"Q: {question}")))
        for prompt_id, (question, answer) in zip(IDS, THREE, strict=True)
    ]


IDS = [f"row/{hashlib.sha1(question.encode()).hexdigest()}" for question, _ in THREE]


def test_what_a_reward_may_read_of_a_row(tmp_path: Path) -> None:
    train = parquet(tmp_path / "train.parquet", verl_rows())
    config = DatasetTaskConfig(
        train_path=train, heldout_path=write(tmp_path / "h.jsonl", verl_rows()[:1]), preset="verl"
    )
    first, _ = load(config)[0]
    assert (first.source, first.answer) == ("sums", "5.5")
    assert first.metadata == {
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": "5.5"},
        "extra_info": {"index": 1, "split": "train"},
    }
    table = pa.table({"question": ["q"], "answer": [7], "at": pa.array([0], pa.date32()), "raw": [b"x"]})
    pq.write_table(table, tmp_path / "types.parquet")
    [row] = read(tmp_path / "types.parquet", source="mine")
    assert (row.answers, row.source, row.metadata) == (("7",), "mine", {"at": "1970-01-01", "raw": None})


def test_levels_and_answers_as_data_have_them(tmp_path: Path) -> None:
    rows = [
        {"question": "a", "answer": [0.1, "1/10", 1e-07], "level": "Level 4"},
        {"question": "b", "answer": 10**20, "level": 3.0},
        {"question": "c", "answer": -2.0, "level": "-1"},
    ]
    found = read(write(tmp_path / "rows.jsonl", rows), level_key="level")
    assert [(row.answers, row.level) for row in found] == [
        (("0.1", "1/10", "1e-07"), 4),
        (("1" + "0" * 20,), 3),
        (("-2",), -1),
    ]


def test_turns_before_the_question(tmp_path: Path) -> None:
    turns = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"), ("user", "1 + 1?")]
    chat = [{"role": role, "content": content} for role, content in turns]
    rows = [
        {"question": chat, "answer": "2"},
        {"question": chat[1:], "answer": "2"},
        {"question": "1 + 1?", "answer": 2},
    ]
    notes: Notes = []
    train, _ = load(config_of(tmp_path, rows, qa("z")), notes.append)
    assert [(prompt.text, prompt.token_ids) for prompt in train] == [
        ("1 + 1?", tuple(encode("Be brief.HiHello1 + 1?"))),
        ("1 + 1?", tuple(encode("1 + 1?"))),
    ]
    assert len({prompt.id for prompt in train}) == 2
    assert "dropped 1 rows with a question seen before" in notes[0]  # another system turn makes no other question
    with pytest.raises(DataError, match=r"train.jsonl:1: the prompt has several turns, .*; set task.chat=true"):
        load(config_of(tmp_path, rows, qa("z"), chat=False))


def test_named_heldout_sets_are_spread_in_every_prefix(tmp_path: Path) -> None:
    paths = {
        name: write(tmp_path / f"{name}.jsonl", qa(*questions)) for name, questions in (("x", "abcdef"), ("y", "gh"))
    }
    config = DatasetTaskConfig(train_path=write(tmp_path / "t.jsonl", qa(*"afhz")), heldout_path=paths)
    train, heldout = load(config, n=7)
    assert [prompt.text for prompt in train] == ["z"]
    assert [prompt.heldout_set for prompt in heldout] == ["x", "y", "x", "y", "x", "x", "x"]
    assert load(config, n=4)[1] == heldout[:4]
    task = make_task(config, encode)
    task.load(0, 2, quiet)
    assert sorted(task.heldout_questions()) == list("abcdefgh")
    assert {prompt.heldout_set for prompt in load(config_of(tmp_path, qa("z"), qa("a")))[1]} == {""}


def test_files_with_presets_of_their_own(tmp_path: Path) -> None:
    """Keys of the task hold for files without a preset; a config that was written out reads back equal."""
    files = [
        {"path": write(tmp_path / "a.jsonl", plain_rows("q")), "source": "a"},
        {"path": write(tmp_path / "b.jsonl", [{"question": "9?", "answer": "#### 8"}]), "preset": "gsm8k"},
    ]
    held = {"own": write(tmp_path / "c.jsonl", plain_rows("q", level=2)[:1])}
    config = DatasetTaskConfig(train_path=files, heldout_path=held, question_key="q")
    train, heldout = load(config)
    assert [(prompt.answer, prompt.source) for prompt in train] == [("5.5", "a"), ("21", "a"), ("8", "")]
    assert heldout[0].text == THREE[0][0]
    assert DatasetTaskConfig(**config.model_dump()) == config


@given(st.lists(st.tuples(st.integers(1, 40), st.floats(0.01, 100.0)), min_size=1, max_size=5), st.integers())
def test_files_are_mixed_by_weight(sizes: list[tuple[int, float]], seed: int) -> None:
    parts = [
        Part(str(number), [Row(f"{number}/{i}", ("",), 0, "", (), "", {}) for i in range(size)], weight)
        for number, (size, weight) in enumerate(sizes)
    ]
    notes: Notes = []
    weights = [weight for _, weight in sizes]
    if 0 in shares(min(size / weight for size, weight in sizes) * sum(weights), weights):
        with pytest.raises(DataError, match="its weight takes none of its"):
            mix(parts, seed, quiet)
        return
    rows = mix(parts, seed, notes.append)
    assert rows == mix(parts, seed, quiet)
    counts = Counter(row.question.partition("/")[0] for row in rows)
    assert [f"{part.title}: {counts[part.title]} of {len(part.rows)} rows, by weight" for part in parts] == notes
    assert any(counts[part.title] == len(part.rows) for part in parts)  # no more rows fit
    total = min(size / weight for size, weight in sizes)
    for part, (_, weight) in zip(parts, sizes, strict=True):
        mine = [row for row in rows if row in part.rows]
        assert mine == [row for row in part.rows if row in mine]  # in the order of the file
        assert abs(counts[part.title] - total * weight) <= 0.5 + 1e-6
    assert mix([Part("all", part.rows) for part in parts], seed, quiet) == [row for part in parts for row in part.rows]


def test_a_file_that_an_earlier_one_repeats_is_named() -> None:
    first, second = ([Row("q", ("a",), 0, f"{name}:1", (), "", {})] for name in "ab")
    with pytest.raises(DataError, match="b: every question was seen before, in another file; leave the file out"):
        _distinct([Part("a", first), Part("b", second)], quiet)


def test_some_files_with_a_weight() -> None:
    files = [{"path": "a", "weight": 1.0}, {"path": "b"}]
    with pytest.raises(ValidationError, match=r"task\.train_path: give a weight to every file, or to none"):
        DatasetTaskConfig(train_path=files, heldout_path="h")


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        ("a.json", '[{"question": "q"}', "a.json: not a JSON row"),
        ("b.json", '[{"question": "q", "answer": "1"}, 3]', "b.json:row 2: a row is a JSON object"),
        ("c.json", '{"data": [\n1]}', "c.json:1: not a JSON row"),
        ("d.csv", "question,answer\na,1\nb,2,3\n", "d.csv:3: the row has 3 fields, the first line names 2; put quotes"),
        ("e.csv", "question,question\na,1\n", "e.csv:1: two columns have one name: ['question', 'question']"),
        ("f.csv", 'question,answer\n"a"b,1\n', "f.csv:2: not CSV: "),
        ("g.csv", "", "g.csv: has no rows"),
        ("h.csv", "question,answer\n", "h.csv: has no rows"),
        ("i.csv", "question;answer\na;1\n", "i.csv:2: no key 'question', the row has ['question;answer']"),
        ("j.csv", "question,answer\na,\n", "j.csv:2: 'answer' is empty"),
    ],
)
def test_json_and_csv_that_are_not_right(tmp_path: Path, name: str, content: str, fault: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError) as caught:
        read(tmp_path / name)
    assert str(caught.value).startswith(f"{tmp_path}/{fault}")
    assert "\n" not in str(caught.value)


def test_wrong_rows_are_left_out_only_where_the_config_allows_it(tmp_path: Path) -> None:
    rows = [*qa("a"), {"question": "b", "answer": None}, *qa("c"), {"question": ""}]
    config = config_of(tmp_path, rows, qa("z"), max_wrong_rows=2)
    notes: Notes = []
    assert [prompt.text for prompt in load(config, notes.append)[0]] == ["a", "c"]
    file = config.train_path[0].path
    line = f"{file}:2: 'answer' is null, not text; write it as a string"
    assert notes == [f"{file}: left out 2 wrong rows, the first is {line}"]
    with pytest.raises(DataError) as caught:
        load(config_of(tmp_path, rows, qa("z"), max_wrong_rows=1))
    assert str(caught.value) == f"{line}; 2 rows are wrong, which task.max_wrong_rows=2 would leave out"


SHARED = Path(__file__).parents[5] / "shared" / "data"


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the public data files")
def test_gsm8k_and_math_as_they_are() -> None:
    gsm8k = read(SHARED / "gsm8k_test.jsonl", preset="gsm8k")
    assert (len(gsm8k), gsm8k[0].answers) == (1319, ("18",))
    math = read(SHARED / "math_train_7474.json", preset="math", level_key="difficulty", max_wrong_rows=4)
    assert len(math) == 7470  # four have no answer
    assert {row.level for row in math} == {0, 1, 2, 3, 4, 5}  # 0 is unknown, in two rows
    assert "Algebra" in {row.metadata["type"] for row in math}

"""Problems: the split never leaks, generation is distinct, even and seeded, and bad rows are named by line."""

from __future__ import annotations

import json
import random
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.demo.tiny_model import make_tokenizer
from qarl.config.task import DatasetTaskConfig, GymDatasetConfig, ReasoningGymTaskConfig, SortingTaskConfig
from qarl.errors import ConfigError, DataError
from qarl.tasks import KINDS, dataset, make_task, sorting
from qarl.tasks.files import raw_rows
from qarl.tasks.task import encoder, take_evenly

Notes = list[str]
TEACHER = sorting.SortingTeacher([2])
SAVED = str(Path(__file__).parents[3] / "data" / "saved_dataset")


def encode(text: str) -> list[int]:
    return [ord(char) for char in text]


def quiet(line: str) -> None:
    """Takes notes and forgets them."""


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def qa(*questions: str, **extra: Any) -> list[dict[str, Any]]:
    return [{"question": question, "answer": f"answer to {question}", **extra} for question in questions]


def config_of(tmp_path: Path, train: list[Any], heldout: list[Any], **keys: Any) -> DatasetTaskConfig:
    return DatasetTaskConfig(
        train_path=write(tmp_path / "train.jsonl", train),
        heldout_path=write(tmp_path / "heldout.jsonl", heldout),
        **keys,
    )


# --- sorting


def test_solve_and_split_of_a_known_problem() -> None:
    assert sorting.solve("529172") == "122579"
    assert sorting.is_heldout("122579") == (zlib.crc32(b"122579") % 10 == 0)


@given(st.text("0123456789", min_size=1, max_size=12), st.integers(), st.floats(0, 1))
def test_teacher_keeps_the_digits(digits: str, seed: int, swap_prob: float) -> None:
    answer = sorting.solve(digits)
    demo = TEACHER.answer(answer, swap_prob, random.Random(seed))
    assert sorting.solve(demo) == answer


def test_teacher_at_the_ends_of_its_sloppiness() -> None:
    assert TEACHER.answer("0123", 0.0, random.Random(0)) == "0123"
    # Every pair is swapped in one scan from the left: the first digit travels to the end.
    assert TEACHER.answer("0123", 1.0, random.Random(0)) == "1230"


def test_teacher_swaps_as_often_as_it_is_told() -> None:
    rng = random.Random(0)
    swapped = sum(TEACHER.answer("01", 0.2, rng) == "10" for _ in range(10_000))
    assert 0.18 < swapped / 10_000 < 0.22


@given(
    st.lists(st.integers(1, 12), min_size=1, max_size=5, unique=True), st.integers(0, 60), st.integers(), st.booleans()
)
def test_generated_problems_are_distinct_in_their_split_and_seeded(
    levels: list[int], n: int, seed: int, heldout: bool
) -> None:
    problems = sorting.generate(levels, n, seed, heldout)
    assert len(problems) == len(set(problems)) <= n
    assert all(len(p) in levels and sorting.is_heldout(sorting.solve(p)) == heldout for p in problems)
    assert problems == sorting.generate(levels, n, seed, heldout)
    assert problems[: n // 2] == sorting.generate(levels, n // 2, seed, heldout)


def test_levels_are_even_and_a_small_one_gives_all_it_has() -> None:
    everything = [f"{i:02d}" for i in range(100)]
    training = {digits for digits in everything if not sorting.is_heldout(sorting.solve(digits))}
    problems = sorting.generate([2, 3, 4], 800, seed=1, heldout=False)
    counts = Counter(map(len, problems))
    assert len(problems) == 800
    assert {p for p in problems if len(p) == 2} == training
    assert abs(counts[3] - counts[4]) <= 1


def test_generation_ends_when_every_problem_is_given() -> None:
    both = sorting.generate([2], 10_000, 0, heldout=False) + sorting.generate([2], 10_000, 0, heldout=True)
    assert sorted(both) == [f"{i:02d}" for i in range(100)]


def test_another_seed_gives_other_problems() -> None:
    assert sorting.generate([6], 20, 0, False) != sorting.generate([6], 20, 1, False)


@pytest.mark.parametrize("levels", [[], [0, 2], [-1], [3, 3]])
def test_impossible_levels(levels: list[int]) -> None:
    with pytest.raises(ConfigError, match=r"task\.levels"):
        sorting.generate(levels, 1, 0, False)


@given(st.lists(st.lists(st.integers(), max_size=8), max_size=5), st.integers(0, 50))
def test_take_evenly(streams: list[list[int]], n: int) -> None:
    taken = take_evenly([iter([(i, x) for x in stream]) for i, stream in enumerate(streams)], n)
    assert len(taken) == min(n, sum(map(len, streams)))
    counts = Counter(i for i, _ in taken)
    for i, stream in enumerate(streams):
        assert [x for j, x in taken if j == i] == stream[: counts[i]]
        # A stream may lag the longest one only when it has ended.
        assert counts[i] == len(stream) or counts[i] >= max(counts.values(), default=0) - 1


def test_every_kind_of_task_has_its_class_and_its_config_tells_what_it_has(tmp_path: Path) -> None:
    gym = ReasoningGymTaskConfig(datasets=[GymDatasetConfig(name="chain_sum")])
    configs = [SortingTaskConfig(), config_of(tmp_path, qa("a"), qa("b")), gym]
    assert [config.kind for config in configs] == list(KINDS)
    for config in configs:
        task = make_task(config)
        assert (task.solve is not None) == config.has_program
        with pytest.raises(AssertionError, match="without a tokenizer"):
            task.prompt("12", "12", 1)


def test_a_chat_has_the_system_turn_and_the_arguments_of_its_config(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(64)
    with pytest.raises(ConfigError, match=r"task\.chat"):
        encoder(tokenizer, config_of(tmp_path, qa("a"), qa("b")))
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '0' if m.role == 'system' else '1' }}{{ m.content }}={% endfor %}"
        "{% if add_generation_prompt %}{{ hint | default('9') }}{% endif %}"
    )
    keys = {"system_prompt": "2", "chat_template_kwargs": {"hint": "8"}}
    cases = {"13=9": {}, "02=13=8": keys, "3": {"chat": False}}
    for text, more in cases.items():
        ids = encoder(tokenizer, config_of(tmp_path, qa("a"), qa("b"), **more))("3")
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_demonstrations_never_show_a_heldout_answer() -> None:
    levels = SortingTaskConfig().levels
    demos = sorting.SortingTeacher(levels).demonstrations(4000, 0.2, random.Random(0))
    answers = [sorting.solve(answer) for _, answer in demos]
    assert [sorting.solve(text.rstrip("=")) for text, _ in demos] == answers
    assert not any(map(sorting.is_heldout, answers))
    counts = {level: sum(len(answer) == level for answer in answers) for level in levels}
    assert all(400 < count < 600 for count in counts.values())


def test_load_sorting() -> None:
    notes: Notes = []
    train, heldout = make_task(SortingTaskConfig(num_prompts=400), encode).load(3, 64, notes.append)
    assert (len(train), len(heldout), notes) == (400, 64, [])
    assert not {sorting.solve(p.answer) for p in train} & {sorting.solve(p.answer) for p in heldout}
    assert len({p.id for p in train + heldout}) == 464
    prompt = train[5]
    digits = prompt.id.removeprefix("sorting/")
    assert (prompt.text, prompt.answer, prompt.level) == (f"{digits}=", sorting.solve(digits), len(digits))
    assert prompt.token_ids == tuple(encode(prompt.text))
    assert (train, heldout) == make_task(SortingTaskConfig(num_prompts=400), encode).load(3, 64, notes.append)


def test_shortage_is_noted() -> None:
    notes: Notes = []
    train, heldout = make_task(SortingTaskConfig(num_prompts=500, levels=[2]), encode).load(0, 50, notes.append)
    assert len(train) + len(heldout) == 100
    assert notes == [
        f"only {len(train)} of 500 training prompts exist",
        f"only {len(heldout)} of 50 held-out prompts exist",
    ]


@pytest.mark.parametrize(("all_heldout", "split"), [(True, "training"), (False, "held-out")])
def test_an_empty_split_is_an_error(monkeypatch: pytest.MonkeyPatch, all_heldout: bool, split: str) -> None:
    monkeypatch.setattr(sorting, "is_heldout", lambda answer: all_heldout)
    with pytest.raises(ConfigError, match=f"no {split} problem"):
        make_task(SortingTaskConfig(num_prompts=5, levels=[1]), encode).load(0, 5, quiet)


# --- rows of files


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
        f"{config.train_path}: dropped 1 rows whose question is held out, the first is {config.train_path}:2"
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
    b'{"question": "q", "answer": 1}': "'answer' is int, not text",
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
        dataset.read_rows(str(path), DatasetTaskConfig(train_path="t", heldout_path="h"))
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
    ],
)
def test_a_row_that_the_options_do_not_fit(
    tmp_path: Path, keys: dict[str, Any], row: dict[str, Any], fault: str
) -> None:
    config = config_of(tmp_path, [{"question": "q", **row}], qa("h"), **keys)
    with pytest.raises(DataError) as caught:
        dataset.load_rows(config, quiet)
    assert str(caught.value).startswith(f"{config.train_path}:1: {fault}")


def test_files_without_rows(tmp_path: Path) -> None:
    config = config_of(tmp_path, [], qa("a"))
    with pytest.raises(DataError, match="no rows"):
        dataset.load_rows(config, quiet)
    Path(config.train_path).unlink()
    with pytest.raises(DataError, match="cannot read: No such file"):
        dataset.load_rows(config, quiet)
    with pytest.raises(DataError, match=r"every question is also in .*heldout\.jsonl"):
        dataset.load_rows(config_of(tmp_path, qa("a"), qa("a")), quiet)


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


def columnar(path: str) -> DatasetTaskConfig:
    return DatasetTaskConfig(train_path=path, heldout_path=path, level_key="level")


def test_parquet_rows_are_those_of_jsonl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qarl.tasks.files.BATCH_ROWS", 2)
    path = parquet(tmp_path / "rows.parquet", ROWS)
    rows = dataset.read_rows(path, columnar(path))
    lines = dataset.read_rows(write(tmp_path / "rows.jsonl", ROWS), columnar(path))
    assert [(r.question, r.answer, r.level) for r in rows] == [(r.question, r.answer, r.level) for r in lines]
    assert [r.where for r in rows] == [f"{path}:row {i}" for i in range(1, 6)]


def test_a_folder_that_datasets_saved() -> None:
    """`tests/data/saved_dataset` was written by `datasets` 5.2.0, in two shards."""
    rows = dataset.read_rows(SAVED, columnar(SAVED))
    assert [(r.question, r.answer, r.level) for r in rows] == [
        ("What is 2+2?", "4", 1),
        ("What is 2+3?", "5", 2),
        ("Was ist 2+4?", "6", 3),
    ]
    assert rows[-1].where == f"{SAVED}:row 3"


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({"question": None}, "'question' is NoneType, not text"),
        ({"question": " "}, "'question' is empty"),
        ({"answer": None}, "'answer' is NoneType, not text"),
        ({"level": None}, "'level' is None, not an integer"),
    ],
)
def test_a_bad_row_of_parquet_is_named_by_its_number(tmp_path: Path, row: dict[str, Any], fault: str) -> None:
    path = parquet(tmp_path / "rows.parquet", [*ROWS[:3], {**ROWS[3], **row}, ROWS[4]])
    with pytest.raises(DataError) as caught:
        dataset.read_rows(path, columnar(path))
    assert str(caught.value).startswith(f"{path}:row 4: {fault}")


def test_columns_that_are_missing_or_of_another_type(tmp_path: Path) -> None:
    path = parquet(tmp_path / "rows.parquet", [{"q": "2+2?", "answer": 4}])
    with pytest.raises(DataError, match=r"no column 'question', there are \['answer', 'q'\]; set task.question_key"):
        dataset.read_rows(path, DatasetTaskConfig(train_path=path, heldout_path=path))
    with pytest.raises(DataError, match=r"row 1: 'answer' is int, not text"):
        dataset.read_rows(path, DatasetTaskConfig(train_path=path, heldout_path=path, question_key="q"))
    with pytest.raises(DataError, match="no column 'questions'"):
        dataset.read_rows(SAVED, DatasetTaskConfig(train_path=SAVED, heldout_path=SAVED, question_key="questions"))


def test_files_that_are_not_what_they_seem(tmp_path: Path) -> None:
    def fault(path: Path) -> str:
        with pytest.raises(DataError) as caught:
            dataset.read_rows(str(path), columnar(str(path)))
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
        list(raw_rows(str(path), {"question", "answer"}))
    assert reason in str(caught.value)
    assert str(path) in str(caught.value)


def test_the_suffix_says_what_a_file_is(tmp_path: Path) -> None:
    pq.write_table(arrow_table(), tmp_path / "rows.Parquet")
    assert len(list(raw_rows(str(tmp_path / "rows.Parquet"), {"question"}))) == 2
    (tmp_path / "rows.Parquet").rename(tmp_path / "rows.jsonl")
    with pytest.raises(DataError, match=r"a Parquet file; give it the suffix \.parquet"):
        list(raw_rows(str(tmp_path / "rows.jsonl"), {"question"}))

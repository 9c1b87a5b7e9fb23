"""Problems: the split never leaks, generation is distinct, even and seeded, and bad rows are named by line."""

from __future__ import annotations

import json
import random
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qarl.errors import ConfigError, DataError
from qarl.tasks import jsonl, load_task, sorting
from qarl.tasks.config import JsonlTaskConfig, SortingTaskConfig

Notes = list[str]


def encode(text: str) -> list[int]:
    return [ord(char) for char in text]


def quiet(line: str) -> None:
    """Takes notes and forgets them."""


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def qa(*questions: str, **extra: Any) -> list[dict[str, Any]]:
    return [{"question": question, "answer": f"answer to {question}", **extra} for question in questions]


def config_of(tmp_path: Path, train: list[Any], heldout: list[Any], **keys: Any) -> JsonlTaskConfig:
    return JsonlTaskConfig(
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
    demo = sorting.teacher(answer, random.Random(seed), swap_prob)
    assert sorting.solve(demo) == answer


def test_teacher_at_the_ends_of_its_sloppiness() -> None:
    assert sorting.teacher("0123", random.Random(0), 0.0) == "0123"
    # Every pair is swapped in one scan from the left: the first digit travels to the end.
    assert sorting.teacher("0123", random.Random(0), 1.0) == "1230"


def test_teacher_swaps_as_often_as_it_is_told() -> None:
    rng = random.Random(0)
    swapped = sum(sorting.teacher("01", rng, 0.2) == "10" for _ in range(10_000))
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
    taken = sorting.take_evenly([iter([(i, x) for x in stream]) for i, stream in enumerate(streams)], n)
    assert len(taken) == min(n, sum(map(len, streams)))
    counts = Counter(i for i, _ in taken)
    for i, stream in enumerate(streams):
        assert [x for j, x in taken if j == i] == stream[: counts[i]]
        # A stream may lag the longest one only when it has ended.
        assert counts[i] == len(stream) or counts[i] >= max(counts.values(), default=0) - 1


def test_load_sorting() -> None:
    notes: Notes = []
    train, heldout = load_task(SortingTaskConfig(num_prompts=400), 3, 64, encode, notes.append)
    assert (len(train), len(heldout), notes) == (400, 64, [])
    assert not {sorting.solve(p.answer) for p in train} & {sorting.solve(p.answer) for p in heldout}
    assert len({p.id for p in train + heldout}) == 464
    prompt = train[5]
    digits = prompt.id.removeprefix("sorting/")
    assert (prompt.text, prompt.answer, prompt.level) == (f"{digits}=", sorting.solve(digits), len(digits))
    assert prompt.token_ids == tuple(encode(prompt.text))
    assert (train, heldout) == load_task(SortingTaskConfig(num_prompts=400), 3, 64, encode, notes.append)


def test_shortage_is_noted() -> None:
    notes: Notes = []
    train, heldout = load_task(SortingTaskConfig(num_prompts=500, levels=[2]), 0, 50, encode, notes.append)
    assert len(train) + len(heldout) == 100
    assert notes == [
        f"only {len(train)} of 500 training prompts exist",
        f"only {len(heldout)} of 50 held-out prompts exist",
    ]


@pytest.mark.parametrize(("all_heldout", "split"), [(True, "training"), (False, "held-out")])
def test_an_empty_split_is_an_error(monkeypatch: pytest.MonkeyPatch, all_heldout: bool, split: str) -> None:
    monkeypatch.setattr(sorting, "is_heldout", lambda answer: all_heldout)
    with pytest.raises(ConfigError, match=f"no {split} problem"):
        load_task(SortingTaskConfig(num_prompts=5, levels=[1]), 0, 5, encode, quiet)


# --- jsonl


def test_load_jsonl(tmp_path: Path) -> None:
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
    (train,), (heldout,) = load_task(config, 0, 1, encode, notes.append)
    assert (train.text, train.answer, train.level) == ("Solve 2+2? {x} in \\boxed{}.", "4", 2)
    assert train.token_ids == tuple(encode(train.text))
    # sha1 of the question: ids in checkpoints must not change.
    assert train.id == "jsonl/399fc8f2fc6c943d400e18f65a82c46c5189e3ee"
    assert heldout.text == "Solve 3+3? in \\boxed{}."
    assert notes == []


def test_duplicates_and_heldout_questions_leave_the_pool(tmp_path: Path) -> None:
    config = config_of(tmp_path, qa("a", "b", "a", "c", " b "), qa("c", "d", "d"))
    notes: Notes = []
    train, heldout = load_task(config, 0, 2, encode, notes.append)
    assert [p.text for p in train] == ["a", "b"]
    assert sorted(p.text for p in heldout) == ["c", "d"]
    assert [note.removeprefix(str(tmp_path)) for note in notes] == [
        "/train.jsonl: dropped 2 rows with a question seen before",
        "/heldout.jsonl: dropped 1 rows with a question seen before",
        "/train.jsonl: dropped 1 rows whose question is held out",
    ]


def test_a_question_is_heldout_even_when_evaluation_does_not_take_it(tmp_path: Path) -> None:
    config = config_of(tmp_path, qa("a", "b", "c", "d"), qa("a", "b", "c"))
    train, heldout = load_task(config, 0, 1, encode, quiet)
    assert ([p.text for p in train], len(heldout)) == (["d"], 1)


def test_heldout_rows_are_taken_evenly_over_levels(tmp_path: Path) -> None:
    rows = qa(*"abcdefgh", level=1) + qa("i", level=2) + qa(*"jklm", level=3)
    config = config_of(tmp_path, qa("z", level=1), rows, level_key="level")
    _, heldout = load_task(config, 0, 7, encode, quiet)
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
        jsonl.read_rows(str(path), JsonlTaskConfig(train_path="", heldout_path=""))
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
        ({"level_key": "level"}, {"answer": "4", "level": True}, "'level' is True, not an integer"),
    ],
)
def test_a_row_that_the_options_do_not_fit(
    tmp_path: Path, keys: dict[str, Any], row: dict[str, Any], fault: str
) -> None:
    config = config_of(tmp_path, [{"question": "q", **row}], qa("h"), **keys)
    with pytest.raises(DataError) as caught:
        jsonl.load_rows(config, quiet)
    assert str(caught.value).startswith(f"{config.train_path}:1: {fault}")


def test_files_without_rows(tmp_path: Path) -> None:
    config = config_of(tmp_path, [], qa("a"))
    with pytest.raises(DataError, match="no rows"):
        jsonl.load_rows(config, quiet)
    Path(config.train_path).unlink()
    with pytest.raises(DataError, match="cannot read: No such file"):
        jsonl.load_rows(config, quiet)
    with pytest.raises(DataError, match=r"every question is also in .*heldout\.jsonl"):
        jsonl.load_rows(config_of(tmp_path, qa("a"), qa("a")), quiet)


def test_a_template_must_hold_the_question(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"task\.prompt_template"):
        load_task(config_of(tmp_path, qa("a"), qa("b"), prompt_template="Hello"), 0, 1, encode, quiet)


@given(st.text(), st.text())
def test_template_keeps_every_other_character(question: str, rest: str) -> None:
    rest = rest.replace("{question}", "")
    assert jsonl.fill_template("{question}" + "|" + rest, question) == question + "|" + rest

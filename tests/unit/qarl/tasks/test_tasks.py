"""Problems: the split never leaks, generation is distinct, even and seeded, and bad rows are named by line."""

from __future__ import annotations

import random
import zlib
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.demo.tiny_model import make_tokenizer
from qarl.config.task import (
    CustomTaskConfig,
    GymDatasetConfig,
    ReasoningGymTaskConfig,
    SortingTaskConfig,
)
from qarl.errors import ConfigError
from qarl.tasks import KINDS, make_task, sorting
from qarl.tasks.task import PromptsTeacher, encoder, take_evenly
from qarl.types import Prompt
from tests.support.task_rows import config_of, qa, quiet

Notes = list[str]
TEACHER = sorting.SortingTeacher([2])


def encode(text: str) -> list[int]:
    return [ord(char) for char in text]


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


@given(st.lists(st.lists(st.integers(), max_size=8), max_size=5), st.integers(0, 50))
def test_take_evenly(streams: list[list[int]], n: int) -> None:
    taken = take_evenly([iter([(i, x) for x in stream]) for i, stream in enumerate(streams)], n)
    assert len(taken) == min(n, sum(map(len, streams)))
    counts = Counter(i for i, _ in taken)
    for i, stream in enumerate(streams):
        assert [x for j, x in taken if j == i] == stream[: counts[i]]
        # A stream may lag the longest one only when it has ended.
        assert counts[i] == len(stream) or counts[i] >= max(counts.values(), default=0) - 1


def test_every_kind_of_task_has_its_class(tmp_path: Path) -> None:
    gym = ReasoningGymTaskConfig(datasets=[GymDatasetConfig(name="chain_sum")])
    own = CustomTaskConfig(function="tests.unit.qarl.tasks.test_custom:problems")
    configs = [SortingTaskConfig(), config_of(tmp_path, qa("a"), qa("b")), gym, own]
    assert [config.kind for config in configs] == list(KINDS)
    for config in configs:
        task = make_task(config)
        assert (task.solve is not None) == (config.kind == "sorting")
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
    with_system = encoder(tokenizer, config_of(tmp_path, qa("a"), qa("b"), **keys))
    for text, turn in {"02=12=13=8": ("user", "2"), "04=13=8": ("system", "4")}.items():  # its own system turn counts
        assert tokenizer.decode(with_system("3", [turn]), skip_special_tokens=True) == text


def test_demonstrations_never_show_a_heldout_answer() -> None:
    levels = SortingTaskConfig().levels
    demos = sorting.SortingTeacher(levels).demonstrations(4000, 0.2, random.Random(0))
    answers = [sorting.solve(answer) for _, answer in demos]
    assert [sorting.solve(text.rstrip("=")) for text, _ in demos] == answers
    assert not any(map(sorting.is_heldout, answers))
    counts = {level: sum(len(answer) == level for answer in answers) for level in levels}
    assert all(400 < count < 600 for count in counts.values())


def test_prompts_are_their_own_teacher() -> None:
    prompts = [Prompt(str(n), f"{n}?", f"{n}{n + 1}", ()) for n in range(10, 15)]
    teacher = PromptsTeacher(prompts)
    demos = teacher.demonstrations(200, 0.0, random.Random(0))
    assert set(demos) == {(prompt.text, prompt.answer) for prompt in prompts}
    mistaken = [answer for _, answer in teacher.demonstrations(200, 0.5, random.Random(0))]
    right = {prompt.answer for prompt in prompts}
    assert 100 < sum(answer not in right for answer in mistaken) < 200
    assert teacher.settings == PromptsTeacher(prompts).settings != PromptsTeacher(prompts[1:]).settings


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

"""Tasks from a function or class outside of the repository, and the one line that says what is wrong with them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from qarl.config.task import CustomTaskConfig
from qarl.errors import ConfigError, DataError, UsageError
from qarl.tasks import make_task
from qarl.tasks.task import Task

SOURCE = """
import random

def problems(seed, count=4, unit="apples"):
    numbers = random.Random(seed).sample(range(100), 2 * count)
    rows = [{"question": f"{n} {unit} and one?", "answer": n + 1, "size": len(str(n)), "n": n} for n in numbers]
    return rows[:count], {"even": (r for r in rows[count:] if r["n"] % 2 == 0), "odd": rows[count:]}

class Sums:
    def __init__(self, highest):
        self.highest = highest

    def __call__(self, seed):
        rows = [{"question": f"{n} + 1", "answer": self.solve(f"{n} + 1")} for n in range(self.highest)]
        return rows[1:], rows[:1]

    def solve(self, question):
        return str(int(question.partition(" ")[0]) + 1)

class Useless:
    pass

class Broken(Sums):
    def __init__(self):
        raise RuntimeError("no\\nmemory")

def one_list(seed):
    return [1, 2, 3]

def no_sets(seed):
    return [1], {}

def odd_set(seed):
    return [1], {"a/b": [1]}

def texts(seed):
    return ["a"], ["b"]

def no_answer(seed):
    return [{"question": "a", "answer": "1"}], {"x": [{"question": "b", "answer": "1"}, {"question": "c"}]}

def nothing(seed):
    return [{"question": "a", "answer": "1"}], []

def not_json(seed):
    return [{"question": "a", "answer": "1", "rng": random.Random(0)}], []

def fails(seed):
    return 1 / 0
"""


def problems(seed: int) -> tuple[list[Any], list[Any]]:
    """Of the test of every kind of task."""
    return [], []


def encode(text: str) -> list[int]:
    return [ord(char) for char in text]


@pytest.fixture
def mine(tmp_path: Path) -> str:
    (tmp_path / "mine.py").write_text(SOURCE)
    return f"{tmp_path}/mine.py"


def task_of(function: str, **keys: Any) -> Task:
    return make_task(CustomTaskConfig(function=function, **keys), encode)


def quiet(line: str) -> None:
    """Takes lines and forgets them."""


def test_a_function_makes_the_rows(mine: str) -> None:
    keys = {"kwargs": {"count": 6, "unit": "pears"}, "level_key": "size", "prompt_template": "How many: {question}"}
    task = task_of(f"{mine}:problems", **keys)
    train, heldout = task.load(3, 5, quiet)
    numbers = random.Random(3).sample(range(100), 12)
    assert [(p.text, p.answer, p.level) for p in train] == [
        (f"How many: {n} pears and one?", str(n + 1), len(str(n))) for n in numbers[:6]
    ]
    assert train[0].metadata == {"n": numbers[0]}
    assert {p.heldout_set for p in heldout} == {"even", "odd"}
    assert (train, heldout) == task.load(3, 5, quiet)
    assert (task.solve, task.teacher) == (None, None)


def test_a_class_may_have_a_solver(mine: str) -> None:
    task = task_of(f"{mine}:Sums", kwargs={"highest": 9})
    train, [heldout] = task.load(0, 1, quiet)
    assert (len(train), heldout.answer) == (8, "1")
    assert task.solve is not None
    assert task.solve("41 + 1") == "42"


@pytest.mark.parametrize(
    ("name", "kwargs", "error", "line"),
    [
        ("problems", {"size": 3}, ConfigError, "task.function: problems cannot be called as problems(seed, size=3): "),
        ("Sums", {}, ConfigError, "task.function: Sums cannot be called as Sums(): missing a required argument"),
        ("Useless", {}, ConfigError, "task.function: {0}:Useless has no method __call__(self, seed)"),
        ("Broken", {}, ConfigError, "task.function: {0}:Broken: RuntimeError: no"),
        ("no_such", {}, ConfigError, "task.function: {0} has no attribute 'no_such'"),
        ("one_list", {}, DataError, "{0}:one_list: ValueError: too many values to unpack (expected 2); it must return"),
        ("no_sets", {}, DataError, "{0}:no_sets: its held-out sets: Dictionary should have at least 1 item"),
        ("odd_set", {}, DataError, "{0}:odd_set: its held-out sets: String should match pattern"),
        ("texts", {}, DataError, "{0}:texts: training row 1: is 'a', not a dict"),
        ("no_answer", {}, DataError, "{0}:no_answer: held-out set 'x' row 2: no key 'answer'"),
        ("nothing", {}, DataError, "{0}:nothing: held-out set 'heldout': has no rows"),
        ("not_json", {}, DataError, "{0}:not_json: training row 1: its other fields are not JSON: Random"),
        ("fails", {}, DataError, "{0}:fails: ZeroDivisionError: division by zero"),
    ],
)
def test_each_fault_is_one_line(
    mine: str, name: str, kwargs: dict[str, Any], error: type[UsageError], line: str
) -> None:
    with pytest.raises(error) as caught:
        task_of(f"{mine}:{name}", kwargs=kwargs).load(0, 1, quiet)
    assert str(caught.value).startswith(line.replace("{0}", mine))
    assert "\n" not in str(caught.value)

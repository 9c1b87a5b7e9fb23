"""Products for the calculator: what is shown, and what is held out."""

from __future__ import annotations

import random

from launch.demo.products import Products
from qarl.config.io import config_path, load_config
from qarl.tasks import make_task
from qarl.tasks.sorting import is_heldout
from rewards.environments.calculator import Calculator


def products(calls: float) -> Products:
    return Products(10, 99, 300, calls)


def test_splits_are_disjoint_and_right() -> None:
    train, heldout = products(0.5)(3)
    assert len(train) == 300
    assert len(heldout) > 20
    assert not {row["question"] for row in train} & {row["question"] for row in heldout}
    assert all(row["answer"] == str(eval(row["question"].rstrip("="))) for row in train + heldout)
    assert (train, heldout) == products(0.1)(3) != products(0.5)(4)


def test_a_demonstrated_call_gets_the_right_answer_from_the_calculator_of_the_config() -> None:
    config = load_config(config_path("calculator"))
    task = make_task(config.task)
    assert task.teacher is not None
    demos = task.teacher.demonstrations(400, 0.0, random.Random(0))
    assert not any(is_heldout(text.partition("=")[0] + "=") for text, _ in demos)
    calls = [(text, answer) for text, answer in demos if answer.startswith("(")]
    assert 80 < len(calls) < 200
    for text, call in calls:
        calculator = Calculator(**config.environment.settings)
        calculator.reset({"answer": products(1.0).solve(text)})
        given, reward, done = calculator.step(call)
        assert (reward, done) == (0.0, False)
        [answer] = {answer for before, answer in demos if before == f"{text}{call}<eos>{given}"} or {None}
        assert answer is None or calculator.step(answer) == (None, 1.0, True)


def test_only_the_head_or_only_the_tool() -> None:
    def texts(calls: float) -> set[str]:
        return {text for text, _ in products(calls).demonstrations(50, 0.2, random.Random(0))}

    assert not any("<eos>" in text for text in texts(0.0))
    assert sum("<eos>" in text for text in texts(1.0)) > 15

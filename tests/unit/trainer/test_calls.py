"""Calls to the learner: what goes on meanwhile, and how long there was one."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from launch.tools.simulate.world import World
from qarl.errors import DivergenceError
from trainer.calls import LearnerCalls
from trainer.clock import Clock


def computes(world: World, seconds: float) -> Callable[[], str]:
    """A call that takes seconds."""

    def call() -> str:
        world.spend(seconds)
        return "done"

    return call


@pytest.mark.parametrize("seconds", [0.001, 0.05, 0.333])
def test_the_driver_goes_on_as_soon_as_the_learner_is_ready(seconds: float) -> None:
    world = World()
    calls = LearnerCalls(world, lambda: True)
    assert calls.during(computes(world, seconds)) == "done"
    assert world.now() == pytest.approx(seconds)
    assert calls.seconds() == pytest.approx(seconds)


def test_a_call_ends_when_it_does_whatever_the_driver_does_then() -> None:
    world = World()

    def slow() -> bool:  # as when a worker is replaced
        world.run(lambda: False, 7.0)
        return True

    calls = LearnerCalls(world, slow)
    calls.during(computes(world, 3.0))
    assert world.now() == pytest.approx(7.0)
    assert calls.seconds() == pytest.approx(3.0)


def test_seconds_of_two_calls_at_once_count_once() -> None:
    world = World()

    def judges() -> bool:
        if world.now() == 0.0:
            calls.alone(computes(world, 2.0))
        return True

    calls = LearnerCalls(world, judges)
    calls.during(computes(world, 5.0))
    assert calls.seconds() == pytest.approx(5.0)
    calls.alone(computes(world, 1.0))
    assert calls.seconds() == pytest.approx(6.0)
    calls.begin()
    assert calls.seconds() == 0.0


def test_others_are_looked_after_often_while_they_work_and_less_often_else() -> None:
    looks = {True: 0, False: 0}
    for at_work in looks:
        world = World()

        def look(at_work: bool = at_work) -> bool:
            looks[at_work] += 1
            return at_work

        LearnerCalls(world, look).during(computes(world, 0.999))
    assert looks == {True: 50, False: 10}


def test_an_error_of_a_call_is_the_callers() -> None:
    def fails() -> None:
        raise DivergenceError("NaN")

    for meanwhile in (None, lambda: True):
        with pytest.raises(DivergenceError, match="NaN"):
            LearnerCalls(Clock(), meanwhile).during(fails)

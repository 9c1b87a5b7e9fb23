"""Virtual time."""

from __future__ import annotations

from concurrent.futures import Future

import pytest

from launch.tools.simulate.world import World


def test_things_happen_in_order_and_time_stops_at_a_limit() -> None:
    world, seen = World(), list[tuple[str, float]]()
    for name, after in (("late", 3.0), ("early", 1.0), ("between", 2.0)):
        world.after(after, lambda name=name: seen.append((name, world.now())))  # type: ignore[misc]
    world.run(lambda: False, timeout_s=2.5)
    assert (seen, world.now()) == ([("early", 1.0), ("between", 2.0)], 2.5)
    world.run(lambda: len(seen) == 3)
    assert seen[-1] == ("late", 3.0)
    with pytest.raises(AssertionError, match="nothing will ever happen"):
        world.run(lambda: False)


def test_a_call_of_a_thread_takes_its_time_while_others_go_on() -> None:
    world = World()

    def work() -> str:
        world.spend(2.0)
        world.spend(1.0)
        return "done"

    result: Future[str] = world.thread("any").submit(work)
    world.spend(1.0)
    assert (world.now(), result.done()) == (1.0, False)
    assert not world.wait(result, 0.5)
    assert world.wait(result, None)
    assert (world.now(), result.result()) == (3.0, "done")


def test_what_runs_shares_the_processors() -> None:
    world = World(processors=2)
    other = world.call(lambda: world.spend(4.0, processors=2))
    world.spend(1.0, processors=1)  # three processors of work on two
    assert (world.now(), world.busy) == (1.5, 2)
    world.wait(other, None)
    assert (world.now(), world.busy) == (1.5 + 3.0, 0)

"""Simulated engines that are interrupted."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from launch.tools.simulate.engines import Engine, SimulatedFleet
from launch.tools.simulate.world import World
from qarl.types import Prompt, SampleRequest
from tests.support.simulation import LENGTH, rates

PREFILL_S = 5.0


def left_after(decode_s: float, steps: float, *later: int) -> list[int]:
    """Tokens that an interruption leaves of a response, after these steps of its own, and of groups that come then."""
    world = World()
    engine = Engine(world, rates(decode_s=lambda batch: decode_s, prefill_s=PREFILL_S), lambda group: None)
    engine.add(0, [LENGTH])
    world.spend(PREFILL_S + steps * decode_s)
    for group, length in enumerate(later, start=1):
        engine.add(group, [length])
    return [tokens for _, tokens in sorted(engine.interrupt(0.0).items())]


def test_a_token_that_has_begun_is_sampled_anew() -> None:
    for decode_s in (0.1, 0.3):
        for done in range(1, LENGTH):  # (5 + n * 0.1 - 5) / 0.1 is seldom n in floats
            assert left_after(decode_s, done) == [LENGTH - done]
            assert left_after(decode_s, done - 0.5) == [LENGTH - done + 1]


def test_an_interruption_within_the_prefill_leaves_every_token() -> None:
    for tenths in range(1, 10 * LENGTH):
        assert left_after(0.3, tenths / 10, 20, 30)[1:] == [20, 30]


def test_segments_of_a_response_that_is_interrupted() -> None:
    """Before its first token, and after three."""
    world = World()
    fleet = SimulatedFleet(world, rates(decode_s=lambda batch: 0.1, prefill_s=2.0), num_workers=1, capacity=10)

    def load(version: int) -> None:
        weights: Any = SimpleNamespace(manifest=SimpleNamespace(version=version))
        fleet.load(weights)

    load(0)
    request = SampleRequest(Prompt("p", "", "", (1,)), seed=0, temperature=1.0, max_new_tokens=64, partial=True)
    (number,) = fleet.submit([[request]])
    world.spend(1.0)
    load(1)
    world.spend(1.0 + 2.0 + 0.3)  # the rest of the prompt, the prompt again, three tokens
    load(2)
    (sample,) = fleet.poll(100.0)[number]
    assert sample.versions_T is not None
    assert sample.versions_T.tolist() == [1] * 3 + [2] * (LENGTH - 3)

"""The worker steps its engine by itself, and answers other calls between two steps."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable
from dataclasses import replace
from multiprocessing import get_context
from threading import Event
from time import sleep
from unittest.mock import Mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qarl.types import Sample, SampleRequest, TrainSequence
from rollout.worker import RolloutWorker
from tests.support.fakes import FakeEngine, logprobs, make_prompts, make_weights

REQUESTS = [SampleRequest(prompt, i, 1.0, 4) for i, prompt in enumerate(make_prompts(4))]


class Endless(FakeEngine):
    """Requests of prompt p0 end when `end` is set, all others soon; `fail` makes the next step fail."""

    def __init__(self) -> None:
        super().__init__()
        self.end, self.fail = Event(), False

    def step(self) -> dict[int, Sample]:
        if self.fail:
            self.fail = False
            raise ZeroDivisionError("division by zero")
        held = {n: r for n, r in self.running.items() if r[1].prompt.id == "p0" and not self.end.is_set()}
        for number in held:
            del self.running[number]
        finished = super().step()
        self.running |= held
        return finished


def run(scenario: Callable[[RolloutWorker, Endless], Awaitable[None]]) -> None:
    engine = Endless()

    async def with_weights() -> None:
        worker = RolloutWorker(lambda _: engine, 0)
        await worker.load(make_weights(1, theta=2.0))
        await asyncio.wait_for(scenario(worker, engine), 60)

    asyncio.run(with_weights())


async def begun(worker: RolloutWorker, engine: Endless, count: int) -> None:
    while len(engine.running) < count:
        await worker.info()


def test_groups_finish_when_they_do_and_calls_are_answered_meanwhile(caplog: pytest.LogCaptureFixture) -> None:
    """The log has one span from the first of the groups that overlap to the end of the last."""
    caplog.set_level(logging.INFO, "qarl.trace")

    async def scenario(worker: RolloutWorker, engine: Endless) -> None:
        slow = asyncio.create_task(worker.generate(REQUESTS[:1]))
        await begun(worker, engine, 1)
        assert [s.prompt.id for s in await worker.generate(REQUESTS[1:])] == ["p1", "p2", "p3"]
        assert await worker.generate([]) == []
        assert (await worker.info()).worker == 0
        assert not slow.done()
        engine.end.set()
        assert [s.version for s in await slow] == [1]
        await worker.load(make_weights(2, theta=3.0))
        assert [s.version for s in await worker.generate(REQUESTS[:1])] == [2]
        await worker.sleep()  # the engine's thread has ended its span then
        await worker.wake()

    run(scenario)
    spans = [message.split()[0] for message in caplog.messages]
    assert spans == ["start", "load", "sample", "load", "sample", "sleep", "wake"]


def test_a_cancelled_call_ends_its_requests_and_no_others() -> None:
    async def scenario(worker: RolloutWorker, engine: Endless) -> None:
        first, second = (asyncio.create_task(worker.generate(REQUESTS[:1])) for _ in range(2))
        await begun(worker, engine, 2)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        while len(engine.running) > 1:
            await worker.info()
        loading = asyncio.create_task(worker.load(make_weights(2)))
        await worker.info()
        assert engine.version == 1  # weights wait for what runs
        engine.end.set()
        assert [s.version for s in await second] == [1]
        await loading
        assert engine.version == 2

    run(scenario)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 5), max_size=4), st.integers(0, 1000))
def test_weights_come_between_two_tokens_of_partial_responses(pauses: list[int], seed: int) -> None:
    thetas = {1: 2.0} | {version: float(version) for version in range(2, 2 + len(pauses))}

    async def scenario(worker: RolloutWorker, engine: Endless) -> None:
        requests = [replace(request, seed=seed, partial=True) for request in REQUESTS[1:]]
        calls = [asyncio.create_task(worker.generate([request])) for request in requests]
        for version, pause in enumerate(pauses, 2):
            for _ in range(pause):
                await worker.info()
            await worker.load(make_weights(version, thetas[version]))
        for call, request in zip(calls, requests, strict=True):
            [sample] = await call
            assert sample.prompt == request.prompt
            assert 1 <= len(sample.response_ids) <= request.max_new_tokens
            assert sample.version == sample.versions[-1]
            sequence = TrainSequence.of(sample)
            assert len(sequence.turns) == len(sample.versions)  # each version sampled one run of tokens
            for version in sample.versions:
                expected_T = logprobs(thetas[version], sample.response_ids)
                ours, theirs = (sequence.at_sampled(values, version) for values in (sample.logprobs_T, expected_T))
                assert ours.tolist() == theirs.tolist()

    run(scenario)


def test_weights_wait_for_whole_responses_and_not_for_partial_ones() -> None:
    async def scenario(worker: RolloutWorker, engine: Endless) -> None:
        partial = asyncio.create_task(worker.generate([replace(REQUESTS[0], max_new_tokens=9, partial=True)]))
        await begun(worker, engine, 1)
        await worker.load(make_weights(2))
        assert not partial.done()
        whole = asyncio.create_task(worker.generate(REQUESTS[:1]))
        await begun(worker, engine, 2)
        loading = asyncio.create_task(worker.load(make_weights(3)))
        await worker.info()
        assert engine.version == 2
        engine.end.set()
        assert [(await call)[0].version for call in (partial, whole)] == [2, 2]
        await loading

    run(scenario)


def test_sleep_waits_for_a_call_that_was_cancelled() -> None:
    """The fleet has forgotten it; the engine has not yet. A fake with requests does not sleep."""

    async def scenario(worker: RolloutWorker, engine: Endless) -> None:
        forgotten = asyncio.create_task(worker.generate(REQUESTS[:1]))
        await begun(worker, engine, 1)
        forgotten.cancel()
        await worker.sleep()
        assert engine.asleep
        await worker.wake()
        assert len(await worker.generate(REQUESTS[1:2])) == 1

    run(scenario)


def test_neither_sleep_nor_weights_come_between_a_call_and_its_requests() -> None:
    """The fleet has forgotten the call, whose requests the engine's thread has not begun yet."""

    async def scenario(worker: RolloutWorker, engine: Endless) -> None:
        for call in (worker.sleep, lambda: worker.load(make_weights(2))):
            gate = Event()
            worker._thread.submit(gate.wait)
            forgotten = asyncio.create_task(worker.generate(REQUESTS[:1]))
            await asyncio.sleep(0)
            waiting = asyncio.create_task(call())
            await asyncio.sleep(0)
            gate.set()
            await begun(worker, engine, 1)
            await worker.info()
            assert not waiting.done()
            forgotten.cancel()
            await waiting
            await worker.wake()
        assert engine.version == 2

    run(scenario)


def test_a_step_that_fails_fails_every_group_and_the_worker_goes_on() -> None:
    async def scenario(worker: RolloutWorker, engine: Endless) -> None:
        calls = [asyncio.create_task(worker.generate(REQUESTS[:1])) for _ in range(2)]
        await begun(worker, engine, 2)
        engine.fail = True
        for call in calls:
            with pytest.raises(ZeroDivisionError):
                await call
        assert engine.running == {}
        assert len(await worker.generate(REQUESTS[1:2])) == 1

    run(scenario)


def test_a_step_that_fails_is_told_where_its_requests_cannot_be_aborted_either(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(worker: RolloutWorker, engine: Endless) -> None:
        call = asyncio.create_task(worker.generate(REQUESTS[:1]))
        await begun(worker, engine, 1)
        monkeypatch.setattr(engine, "abort", Mock(side_effect=OSError))
        engine.fail = True
        with pytest.raises(ZeroDivisionError):
            await asyncio.wait_for(call, 30)

    run(scenario)


def test_a_worker_ends_with_the_first_process_of_its_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fleet replaces it then; an engine without one of its processes would never answer."""
    ended = Event()
    monkeypatch.setattr(os, "_exit", lambda code: ended.set())
    child = get_context("fork").Process(target=sleep, args=(60,))

    def make_engine(_: int) -> Endless:
        child.start()
        return Endless()

    worker = RolloutWorker(make_engine, 0)
    asyncio.run(worker.info())
    assert not ended.is_set()
    child.kill()
    assert ended.wait(30)

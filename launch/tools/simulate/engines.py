"""Engines and their fleet in virtual time. The dispatcher is the real one."""

import heapq
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from random import Random

import numpy as np

from launch.tools.simulate.rates import Rates
from launch.tools.simulate.world import World
from qarl.protocols import Prover
from qarl.quant.scheme import QuantScheme
from qarl.types import Sample, SampleRequest
from qarl.weights.source import WeightSource
from rollout.dispatch import Dispatcher


class Engine:
    """Requests of one engine: `rates.slots` of them run, the others wait. A step gives every running one a token.

    Between two changes of the number of running requests all steps take the same time.

    Args:
        finished: is told the group of each request that ends.
    """

    def __init__(self, world: World, rates: Rates, finished: Callable[[int], None]) -> None:
        self._world, self._rates, self._finished = world, rates, finished
        self._running: list[tuple[float, int, int]] = []  # heap of (engine step that ends it, group, number in it)
        self._waiting: deque[tuple[int, int, int]] = deque()  # (tokens, group, number in it)
        self._steps = self._since = 0.0  # engine steps, and the work at which they were counted
        self._turn = 0  # an end that was set in an earlier turn does not happen
        self._is_busy = False

    def add(self, group: int, lengths: Sequence[int]) -> None:
        """Take a group. Its prompt is read first, which holds up what runs."""
        self._count()
        self._since += self._rates.prefill_s
        self._waiting.extend((length, group, index) for index, length in enumerate(lengths))
        self._go_on()

    def abort(self, group: int) -> None:
        self._count()
        self._running = [row for row in self._running if row[1] != group]
        heapq.heapify(self._running)
        self._waiting = deque(row for row in self._waiting if row[1] != group)
        self._go_on()

    def interrupt(self, pause_s: float) -> dict[tuple[int, int], int]:
        """Stop for new weights, under which all that runs is read again as a prompt. Returns the tokens that are left,
        by group and number in it."""
        self._count()
        self._since += pause_s + len(self._running) * self._rates.prefill_s
        self._go_on()
        # A token that has begun is sampled anew. Sums of floats miss a whole number by a little.
        left = {(group, index): math.ceil(end - self._steps - 1e-6) for end, group, index in self._running}
        return left | {(group, index): length for length, group, index in self._waiting}

    def _count(self) -> None:
        passed = self._world.work - self._since
        if self._running and passed > 0:
            self._steps += passed / self._rates.decode_s(len(self._running))
        self._since = max(self._since, self._world.work)

    def _go_on(self) -> None:
        while self._waiting and len(self._running) < self._rates.slots:
            length, group, index = self._waiting.popleft()
            heapq.heappush(self._running, (self._steps + length, group, index))
        self._turn += 1
        if self._is_busy != bool(self._running):
            self._is_busy = not self._is_busy
            self._world.busy += 1 if self._is_busy else -1
        if self._running:
            left = (self._running[0][0] - self._steps) * self._rates.decode_s(len(self._running))
            self._world.after(self._since + left - self._world.work, partial(self._end, self._turn))

    def _end(self, turn: int) -> None:
        if turn != self._turn:
            return
        self._count()
        self._steps = self._running[0][0]  # without the rounding of its float
        ended = []
        while self._running and self._running[0][0] == self._steps:
            ended.append(heapq.heappop(self._running)[1])
        for group in ended:
            self._finished(group)
        self._go_on()


class SimulatedFleet:
    """A `Fleet` of engines in virtual time. What it samples has random lengths, and log-probs of 0.

    Args:
        capacity: as of `RayFleet`.
    """

    def __init__(self, world: World, rates: Rates, num_workers: int, capacity: int) -> None:
        self._world, self._rates = world, rates
        self._engines = [Engine(world, rates, self._end) for _ in range(num_workers)]
        self._dispatcher = Dispatcher(num_workers, capacity)
        self._samples: dict[int, list[Sample]] = {}  # by number of the group, until it is finished
        self._running: dict[int, tuple[int, int]] = {}  # requests that are not finished, and the worker
        self._partial: set[int] = set()  # groups that may go on under newer weights
        self._finished: dict[int, list[Sample]] = {}
        self._busy_since: dict[int, float] = {}
        self._busy_s = 0.0
        self._has_ended = False  # a request, since the last poll
        self._next = 0
        self._version = -1

    def submit(self, groups: Sequence[Sequence[SampleRequest]]) -> list[int]:
        numbers = list(range(self._next, self._next + len(groups)))
        self._next += len(groups)
        for number, requests in zip(numbers, groups, strict=True):
            self._samples[number] = [self._sample(request) for request in requests]
            self._partial |= {number} if all(request.partial for request in requests) else set()
            self._dispatcher.add(number, len(requests))
        self._dispatch()
        return numbers

    def poll(self, timeout_s: float) -> dict[int, list[Sample]]:
        self._dispatch()
        self._has_ended = bool(self._finished)
        if self._running:
            self._world.run(lambda: self._has_ended, timeout_s)
        finished, self._finished = self._finished, {}
        return finished

    def queued(self) -> set[int]:
        return self._dispatcher.waiting()

    def abort(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            if self._finished.pop(number, None) is None:
                if number in self._running:
                    self._engines[self._running[number][1]].abort(number)
                self._forget(number)

    def sample(self, requests: Sequence[SampleRequest]) -> list[Sample]:
        """For evaluations, which are no part of a step: they take no time here."""
        return [self._sample(request) for request in requests]

    def sleep(self) -> None:
        """Takes no time: no simulated engine shares a device with the learner."""

    def wake(self) -> None:
        pass

    def busy_s(self) -> float:
        now = self._world.now()
        return (self._busy_s + sum(now - since for since in self._busy_since.values())) / len(self._engines)

    def load(self, weights: WeightSource, prover: Prover | None = None) -> dict[int, float]:
        """Groups that workers have begun are finished first, unless they are partial. All engines load and are probed
        alike; the prover sees one."""
        self._world.run(lambda: self._running.keys() <= self._partial)
        self._version = weights.manifest.version
        for engine in self._engines:
            for (number, index), left in engine.interrupt(self._rates.publish_s).items():
                self._samples[number][index] = self._goes_on(self._samples[number][index], left)
        self._world.spend(self._rates.publish_s, len(self._engines))
        if prover is None:
            return {}
        samples = [self._sample(request) for request in prover.requests(self._version)]
        longest = max(len(sample.response_ids) for sample in samples)
        probe_s = len(samples) * self._rates.prefill_s + longest * self._rates.decode_s(len(samples))
        self._world.spend(probe_s, len(self._engines))
        return prover.judge({0: samples}, self._version)

    def switch(self, scheme: QuantScheme) -> None:
        raise NotImplementedError("a schedule of schemes")

    def close(self) -> None: ...

    def _sample(self, request: SampleRequest) -> Sample:
        """A response of a length that depends on its seed alone. Its version is set when it begins."""
        drawn = Random(request.seed).choice(self._rates.lengths)
        length = min(drawn, -(-request.max_new_tokens // self._rates.token))
        reason = "stop" if length == drawn else "length"
        return Sample(request.prompt, (0,) * length, np.zeros(length, np.float32), "", reason, self._version)

    def _goes_on(self, sample: Sample, left: int) -> Sample:
        """The sample with its last tokens of the version of now."""
        before_T = np.full(len(sample.response_ids), sample.version)
        versions_T = before_T if sample.versions_T is None else sample.versions_T.copy()
        versions_T[max(0, len(versions_T) - left) :] = self._version
        return replace(sample, version=self._version, versions_T=versions_T)

    def _dispatch(self) -> None:
        for number, worker in self._dispatcher.assign():
            self._busy_since.setdefault(worker, self._world.now())
            samples = [replace(sample, version=self._version) for sample in self._samples[number]]
            self._samples[number], self._running[number] = samples, (len(samples), worker)
            self._engines[worker].add(number, [len(sample.response_ids) for sample in samples])

    def _end(self, number: int) -> None:
        """A request of a group is finished."""
        self._dispatcher.finish_one(number)
        self._has_ended = True
        left, worker = self._running[number]
        self._running[number] = left - 1, worker
        if left == 1:
            self._finished[number] = self._samples[number]
            self._forget(number)

    def _forget(self, number: int) -> None:
        _, worker = self._running.pop(number, (0, None))
        del self._samples[number]
        self._partial.discard(number)
        self._dispatcher.remove(number)
        if worker is not None and not self._dispatcher.given(worker):
            self._busy_s += self._world.now() - self._busy_since.pop(worker)

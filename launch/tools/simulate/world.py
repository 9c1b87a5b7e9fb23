"""Virtual time: a clock for the training loop whose seconds cost nothing, and the order of what happens.

All that runs shares the processors. While it needs more of them than there are, everything takes longer in proportion:
seconds of work and seconds of the clock are then two things.
"""

import heapq
from collections.abc import Callable
from concurrent.futures import Future
from itertools import count
from math import inf
from typing import Any, TypeVar

from trainer.clock import Clock

T = TypeVar("T")


class World(Clock):
    """Where a simulation happens.

    Attributes:
        work: seconds of work since the beginning that a process with a processor of its own would have done.
        busy: processors that are needed at the moment.
    """

    def __init__(self, processors: float = inf) -> None:
        self.work = self.busy = 0.0
        self._now, self._processors = 0.0, processors
        self._events: list[tuple[float, int, Callable[[], None]]] = []  # (work, number, what happens)
        self._numbers = count()
        self._costs: list[tuple[float, float]] | None = None  # of the call that a thread makes

    def now(self) -> float:
        return self._now

    def after(self, work_s: float, happen: Callable[[], None]) -> None:
        """Let something happen after seconds of work."""
        heapq.heappush(self._events, (self.work + work_s, next(self._numbers), happen))

    def run(self, done: Callable[[], bool], timeout_s: float = inf) -> None:
        """Let time pass until `done`, at most `timeout_s`."""
        end = self._now + timeout_s
        while not done():
            slowdown = max(1.0, self.busy / self._processors)
            at = self._now + (self._events[0][0] - self.work) * slowdown if self._events else inf
            assert min(at, end) < inf, "nothing will ever happen"
            if at > end:
                self.work, self._now = self.work + (end - self._now) / slowdown, end
                return
            self.work, _, happen = heapq.heappop(self._events)
            self._now = at
            happen()

    def spend(self, work_s: float, processors: float = 0.0) -> None:
        """What the caller does takes seconds of work on so many processors."""
        if self._costs is not None:
            self._costs.append((work_s, processors))
            return
        self._start(work_s, processors, ended := Future[None](), None)
        self.run(ended.done)

    def thread(self, name: str) -> "_Thread":
        return _Thread(self)

    def wait(self, result: Future[Any], timeout_s: float | None) -> bool:
        self.run(result.done, inf if timeout_s is None else timeout_s)
        return result.done()

    def call(self, call: Callable[[], T]) -> Future[T]:
        """Its result, which is there when what it spends has passed; others go on meanwhile."""
        self._costs = []
        value, costs, self._costs = call(), self._costs, None
        result = Future[T]()
        self._start(sum(cost for cost, _ in costs), max((used for _, used in costs), default=0.0), result, value)
        return result

    def _start(self, work_s: float, processors: float, result: Future[T], value: T) -> None:
        def end() -> None:
            self.busy -= processors
            result.set_result(value)

        self.busy += processors
        self.after(work_s, end)


class _Thread:
    """A `Thread`, which never has two calls at once here."""

    def __init__(self, world: World) -> None:
        self._world = world

    def submit(self, call: Callable[..., T], /, *args: Any) -> Future[T]:
        return self._world.call(lambda: call(*args))

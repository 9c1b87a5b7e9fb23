"""A clock that is told what time it is, and partners that take time by it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from qarl.types import Sample, SampleRequest
from tests.support.fakes import FakeFleet
from trainer.clock import Clock

T = TypeVar("T")


class _AtOnce:
    def submit(self, call: Callable[..., T], /, *args: Any) -> Future[T]:
        result = Future[T]()
        result.set_result(call(*args))
        return result


class Told(Clock):
    """Its threads do everything at once."""

    def __init__(self) -> None:
        self.moment = 0.0

    def now(self) -> float:
        return self.moment

    def thread(self, name: str) -> _AtOnce:
        return _AtOnce()

    def wait(self, result: Future[Any], timeout_s: float | None) -> bool:
        return result.done()


class TimedFleet(FakeFleet):
    """Group n takes `seconds[n]` from the moment at which one of the `slots` is free."""

    def __init__(self, clock: Told, seconds: Sequence[float], slots: int = 99) -> None:
        super().__init__()
        self._clock, self._seconds, self._free = clock, seconds, [0.0] * slots
        self.times: dict[int, tuple[float, float]] = {}  # begin and end of what is not finished
        self.aborted: list[int] = []
        self._busy_s = 0.0  # of waiting for it

    def busy_s(self) -> float:
        return self._busy_s

    def submit(self, groups: Sequence[Sequence[SampleRequest]]) -> list[int]:
        numbers = super().submit(groups)
        for number in numbers:
            slot = min(range(len(self._free)), key=self._free.__getitem__)
            begin = max(self._clock.moment, self._free[slot])
            self._free[slot] = begin + self._seconds[number]
            self.times[number] = begin, self._free[slot]
        return numbers

    def poll(self, timeout_s: float) -> dict[int, list[Sample]]:
        first = min((end for _, end in self.times.values()), default=0.0)
        began = self._clock.moment
        self._clock.moment = max(began, min(first, began + timeout_s))
        self._busy_s += self._clock.moment - began
        ended = [number for number, (_, end) in self.times.items() if end <= self._clock.moment]
        for number in ended:
            del self.times[number]
        return {number: self.finished.pop(number) for number in ended}

    def queued(self) -> set[int]:
        return {number for number, (begin, _) in self.times.items() if begin > self._clock.moment}

    def abort(self, numbers: Sequence[int]) -> None:
        super().abort(numbers)
        self.aborted += numbers
        for number in numbers:
            del self.times[number]

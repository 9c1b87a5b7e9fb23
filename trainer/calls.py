"""Calls to the learner: how long it has one, and what goes on meanwhile."""

import math
from collections.abc import Callable
from concurrent.futures import Future
from typing import ParamSpec, TypeVar

from trainer.clock import Clock

P = ParamSpec("P")
T = TypeVar("T")
LOOK_S = 0.02
"""How often others are looked after while the learner computes."""
IDLE_LOOK_S = 0.1
"""The same while they have nothing to do but what runs already."""


class LearnerCalls:
    """Makes calls, and knows how long there was one.

    Args:
        meanwhile: is called again and again while a call of `during` runs in a thread. It must not wait, and returns
            whether it will have something to do soon. None: no call runs in a thread.
    """

    def __init__(self, clock: Clock, meanwhile: Callable[[], bool] | None) -> None:
        self._clock, self._meanwhile = clock, meanwhile
        self._thread = clock.thread("learner")
        self._spans: list[tuple[float, float]] = []  # begin and end of each call

    def alone(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The result of a call; nothing goes on meanwhile."""
        began = self._clock.now()
        try:
            return call(*args, **kwargs)
        finally:
            self._spans.append((began, self._clock.now()))

    def during(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The result of a call; others are looked after meanwhile."""
        if self._meanwhile is None:
            return self.alone(call, *args, **kwargs)
        began, ended = self._clock.now(), Future[float]()
        result = self._thread.submit(lambda: call(*args, **kwargs))
        result.add_done_callback(lambda _: ended.set_result(self._clock.now()))
        while not result.done():
            # The result ends the wait at once, wherever the others are.
            self._clock.wait(result, LOOK_S if self._meanwhile() else IDLE_LOOK_S)
        self._spans.append((began, ended.result()))
        return result.result()

    def begin(self) -> None:
        """Count from now on."""
        self._spans = []

    def seconds(self) -> float:
        """In how many seconds since `begin` there was a call. Of two at the same time each second counts once."""
        total, until = 0.0, -math.inf
        for began, ended in sorted(self._spans):
            total += max(0.0, ended - max(began, until))
            until = max(until, ended)
        return total

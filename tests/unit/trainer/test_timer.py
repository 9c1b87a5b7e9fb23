"""The timer of a step, on a clock that is told the time."""

from __future__ import annotations

from trainer.clock import Clock
from trainer.timer import Timer


class Told(Clock):
    def __init__(self, *moments: float) -> None:
        self._moments = iter(moments)

    def now(self) -> float:
        return next(self._moments)


def test_seconds_of_one_name_add_up() -> None:
    timer = Timer(clock=Told(0.0, 1.0, 1.5, 3.0, 7.0, 7.25))
    with timer("step"):
        with timer("sample"):
            pass
        with timer("sample"):
            pass
    assert timer.metrics() == {"timing_s/sample": 0.5 + 4.0, "timing_s/step": 7.25}

"""The timer of a step, on a clock that is told the time."""

from __future__ import annotations

import pytest

from trainer import timer as module
from trainer.timer import Timer


def test_seconds_of_one_name_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 1.5, 3.0, 7.0, 7.25])
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(clock))
    timer = Timer()
    with timer("step"):
        with timer("sample"):
            pass
        with timer("sample"):
            pass
    assert timer.metrics() == {"timing_s/sample": 0.5 + 4.0, "timing_s/step": 7.25}

"""Where the seconds of a step go."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from qarl.trace import span


class Timer:
    """Adds up wall-clock seconds by name; `on_begin` is told each name when it begins. The log gets a span
    of that name, or `label`.

    Example:
        timer = Timer()
        with timer("sample"):
            ...
        timer.metrics()  # {"timing_s/sample": 1.5}
    """

    def __init__(self, on_begin: Callable[[str], None] = lambda name: None) -> None:
        self.seconds: dict[str, float] = {}
        self._on_begin = on_begin

    @contextmanager
    def __call__(self, name: str, label: str = "") -> Iterator[None]:
        self._on_begin(name)
        started = time.perf_counter()
        with span(label or name):
            yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

    def metrics(self) -> dict[str, float]:
        return {f"timing_s/{name}": seconds for name, seconds in self.seconds.items()}

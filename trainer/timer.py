"""Where the seconds of a step go."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from qarl.trace import span
from trainer.clock import Clock


class Timer:
    """Adds up a clock's seconds by name; `on_begin` is told each name when it begins. The log gets a span
    of that name, or `label`.

    Example:
        timer = Timer()
        with timer("sample"):
            ...
        timer.metrics()  # {"timing_s/sample": 1.5}
    """

    def __init__(self, on_begin: Callable[[str], None] = lambda name: None, clock: Clock | None = None) -> None:
        self.seconds: dict[str, float] = {}
        self._on_begin, self._clock = on_begin, clock or Clock()

    @contextmanager
    def __call__(self, name: str, label: str = "") -> Iterator[None]:
        self._on_begin(name)
        started = self._clock.now()
        with span(label or name):
            yield
        self.seconds[name] = self.seconds.get(name, 0.0) + self._clock.now() - started

    def metrics(self) -> dict[str, float]:
        return {f"timing_s/{name}": seconds for name, seconds in self.seconds.items()}

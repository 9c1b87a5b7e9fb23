"""Time and threads of the training loop."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from time import monotonic
from typing import Any, Protocol, TypeVar

T = TypeVar("T")


class Thread(Protocol):
    """Runs one call after the other."""

    def submit(self, call: Callable[..., T], /, *args: Any) -> Future[T]: ...


class Clock:
    """The machine's own. `qarl simulate` has another one, whose seconds cost nothing."""

    def now(self) -> float:
        """Seconds since some moment."""
        return monotonic()

    def thread(self, name: str) -> Thread:
        return ThreadPoolExecutor(1, name)

    def wait(self, result: Future[Any], timeout_s: float | None) -> bool:
        """Whether there is a result, after waiting for it at most that long; None: as long as it takes."""
        return bool(wait([result], timeout_s).done)

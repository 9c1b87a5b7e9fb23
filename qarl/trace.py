"""Who works when: spans in the log of each process, and a profile of some steps of one process by torch's profiler."""

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LOG = logging.getLogger(__name__)


@contextmanager
def span(name: str) -> Iterator[None]:
    """Log when this process began what is done within, and how many seconds it took; also a decorator.

    `qarl trace` and the report draw these lines. "ROW/NAME" gets a row of its own, besides that of the process.
    """
    began = time.time()
    try:
        yield
    finally:
        LOG.info("%s from %.6f for %.6f s", name, began, time.time() - began)


class StepTrace:
    """Traces this process from the publication before step `first` to the publication at the end of step `last`.

    Args:
        steps: [first, last].
        file: the trace, for chrome://tracing or ui.perfetto.dev.
    """

    def __init__(self, steps: Sequence[int], file: Path) -> None:
        self._steps, self._file = steps, file
        self._profile: Any = None

    def published(self, version: int) -> None:
        """Say that this process has weights `version`, those at the end of step `version`."""
        import torch

        first, last = self._steps
        if self._profile is None and first - 1 <= version < last:
            self._profile = torch.profiler.profile()
            self._profile.start()
        elif self._profile is not None and version >= last:
            self._profile.stop()
            self._file.parent.mkdir(parents=True, exist_ok=True)
            self._profile.export_chrome_trace(str(self._file))
            self._profile = None

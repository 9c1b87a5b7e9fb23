"""Commands as from a shell."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest


@pytest.fixture
def as_from_a_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In an empty folder, without the traceback switch; the handlers that `main` sets are taken back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    monkeypatch.chdir(tmp_path)
    with patch.dict(os.environ):  # `main` adds to it
        os.environ.pop("QARL_TRACEBACK", None)
        yield
    for number, handler in before.items():
        signal.signal(number, handler)

"""The log files of a run, `runs/NAME/logs`: one for the driver and one for each actor and verifier."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
MAX_TAIL_BYTES = 65536
MAX_LINE = 300


def log_file(
    log_dir: Path | None, kind: Literal["worker", "rank", "verifier", "environment"], number: int
) -> Path | None:
    """The log of an actor or verifier; None where there is no `log_dir`."""
    return log_dir and log_dir / f"{kind}-{number}.log"


def redirect_output(file: Path | None) -> None:
    """From now on append to `file` whatever this process and its libraries print, and what it logs from level INFO on.

    With None, output goes where it went before.
    """
    if file is None:
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    opened = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for output in (1, 2):  # the descriptors, not sys.stdout: C++ libraries write to them, too
        os.dup2(opened, output)
    os.close(opened)
    logging.basicConfig(level=logging.INFO, format=FORMAT, force=True)
    logging.getLogger(__name__).info("process %d starts", os.getpid())


class _LogFile(logging.FileHandler):
    """It loses lines in silence while the disk is full: the run says so, where it cannot write what it needs."""

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exception(), OSError):
            super().handleError(record)

    def close(self) -> None:
        with suppress(OSError):
            super().close()


@contextmanager
def driver_log(file: Path) -> Iterator[None]:
    """Append to `file` what this process logs from level INFO on, and the traceback of an error that ends the run."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handler = _LogFile(file)
    handler.setFormatter(logging.Formatter(FORMAT))
    root, log = logging.getLogger(), logging.getLogger(__name__)
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    try:
        yield
    except BaseException:  # an interrupt ends the run, too
        log.exception("the run ends with an error")
        raise
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
        handler.close()


def tail(file: Path | None) -> str:
    """ "its log FILE ends with: LINE", for the message about a dead process; empty where it has no log. A span, which
    `qarl.trace` writes, is not taken for the LINE: it tells no reason."""
    if file is None:
        return ""
    if not file.exists():
        return f"its log is {file}"
    with file.open("rb") as opened:
        opened.seek(max(0, file.stat().st_size - MAX_TAIL_BYTES))
        lines = opened.read().decode(errors="replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip() and " qarl.trace: " not in line), "")
    return f"its log {file} ends with: {last[:MAX_LINE]}"

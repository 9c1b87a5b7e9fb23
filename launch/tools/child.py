"""Child processes of a tool, which do not outlive it."""

import ctypes
import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

PR_SET_PDEATHSIG = 1


def end_with_parent() -> None:
    """Have Linux kill this process when its parent is gone: an engine would compute on, unheard."""
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it went before the call
        os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def child(command: Sequence[str], log: Path) -> Iterator[psutil.Popen]:
    """Start a command whose output goes to `log`. When the block fails or is interrupted, the command is ended, as by
    Ctrl-C, and waited for."""
    with (
        log.open("wb") as file,
        psutil.Popen(command, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL) as process,
    ):
        try:
            yield process
        except BaseException:  # Ctrl-C, too
            process.terminate()
            process.wait()
            raise

"""Child processes of a tool, which do not outlive it."""

import ctypes
import os
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any

import psutil

from qarl.errors import how_ended

PR_SET_PDEATHSIG = 1


def end_with_parent() -> None:
    """Have Linux kill this process when its parent is gone: an engine would compute on, unheard."""
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it went before the call
        os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def own_process() -> Iterator[Callable[..., Any]]:
    """A process that does not outlive this one, as a function: `call(f, *args)` is what `f(*args)` gives there.

    A call raises what `f` raises, and BrokenProcessPool, with how the process ended, when it is gone.
    """
    with ProcessPoolExecutor(1, get_context("spawn"), end_with_parent) as pool:
        others = active_children()
        pool.submit(int).result()
        [process] = [process for process in active_children() if process not in others]

        def call(function: Callable[..., Any], *args: Any) -> Any:
            try:
                return pool.submit(function, *args).result()
            except BrokenProcessPool as error:
                pool.shutdown()  # it waits for the process, whose exit code is known then
                raise BrokenProcessPool(f"its process {how_ended(process.exitcode or 0)}") from error

        yield call


@contextmanager
def child(command: Sequence[str], log: Path) -> Iterator[psutil.Popen]:
    """Start a command whose output goes to `log`. When the block fails or is interrupted, the command is ended, as by
    Ctrl-C, and waited for."""
    with (
        log.open("wb") as file,
        psutil.Popen(command, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL) as process,
        ExitStack() as stack,
    ):
        stack.callback(process.wait)
        stack.callback(process.terminate)
        yield process
        stack.pop_all()

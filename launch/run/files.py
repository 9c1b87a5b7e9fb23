"""Files of a run: written whole or not at all, by one process at a time."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from qarl.errors import ConfigError

SUMMARY_FILE = "summary.json"
"""A run that has ended well has it."""


def write_whole(path: Path, text: str) -> None:
    """Write a file so that whoever reads it finds the old content or the new one, even after a loss of power."""
    with suppress(FileNotFoundError):
        os.close(os.open(path, os.O_WRONLY))  # a folder, or links in a circle, are told with their name
    path = path.resolve()  # a link stays, and what it names is written
    part = path.with_name(f"{path.name}.part")
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


@contextmanager
def only_writer(run_dir: Path, log: Callable[[str], None]) -> Iterator[None]:
    """Keep every other process from the run in `run_dir`, by a lock beside that folder.

    The system frees the lock of a process that is killed. Its file stays, and `log` gets a line that says so.
    Raises ConfigError: another process has the lock, or no file can be made there.
    """
    file = run_dir.with_name(f".{run_dir.name}.lock")
    with ExitStack() as stack:
        try:
            made = [folder for folder in file.parents if not folder.exists()]
            stack.callback(_remove_empty, made)
            file.parent.mkdir(parents=True, exist_ok=True)
            lock = _lock(file)
            stack.callback(os.close, lock)
            stack.callback(file.unlink, missing_ok=True)
            owner = os.pread(lock, 1000, 0).decode(errors="replace")
            os.ftruncate(lock, 0)
            os.pwrite(lock, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        except BlockingIOError as error:
            owner = file.read_text(errors="replace") or "another process"
            hint = "wait until it has ended, stop it, or choose another run.name"
            raise ConfigError(f"{owner} is at work on this run", str(run_dir), hint) from error
        except (OSError, ValueError) as error:  # ValueError: a path that no file can have
            raise unusable(run_dir, error) from error
        if owner:
            log(f"{run_dir}: {owner} was killed at work on this run; its lock is no longer valid")
        yield


def is_locked(run_dir: Path) -> bool:
    """Whether a process on this machine is at work on the run in `run_dir`."""
    file = run_dir.with_name(f".{run_dir.name}.lock")
    if not file.is_file():
        return False
    with file.open() as opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def unusable(path: Path, error: OSError | ValueError) -> ConfigError:
    """The error to raise when the file system refuses `path` before a run has started."""
    reason = (isinstance(error, OSError) and error.strerror) or error
    where = str(getattr(error, "filename", None) or path).encode(errors="backslashreplace").decode()
    return ConfigError(f"cannot be used: {reason}", where, "change run.dir or run.name")


def _lock(file: Path) -> int:
    """The locked file, opened. Raises BlockingIOError: another process has locked it."""
    while True:
        lock = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        with ExitStack() as stack:
            stack.callback(os.close, lock)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if file.exists() and os.path.samestat(os.fstat(lock), file.stat()):  # else its owner has just removed it
                stack.pop_all()
                return lock


def _remove_empty(folders: Sequence[Path]) -> None:
    with suppress(OSError, ValueError):  # one that is not empty ends it
        for folder in folders:
            folder.rmdir()

"""A child process that can be killed at any time, at the other end of a connection."""

import os
import signal
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from multiprocessing import Pipe
from pathlib import Path
from typing import Generic, Self, TypeVar

from qarl.errors import ConfigError, QarlError, how_ended
from qarl.logs import tail

START_LIMIT_S = 60.0


class KilledError(QarlError):
    """A child process was killed from outside while it started."""


class ChildProcess:
    """Runs `command` with two more arguments: a file descriptor, whose other end is `connection`, and `log` or "".

    Args:
        what: names the process in errors.
        where: the user's function that it runs, for errors.
        env: its environment.

    Raises QarlError: the system does not run the command.
    """

    def __init__(self, command: Sequence[str], what: str, where: str, log: Path | None, env: Mapping[str, str]) -> None:
        self._what, self._where, self._log = what, where, log
        self.connection, theirs = Pipe()
        with theirs:
            fd = theirs.fileno()
            # Not multiprocessing: it would import the parent's __main__ again, which may be a CLI script.
            try:
                self.process = subprocess.Popen(
                    [*command, str(fd), str(log or "")],
                    pass_fds=[fd],
                    stdin=subprocess.DEVNULL,
                    stdout=2,  # what the user's function prints goes to our stderr, unless it has a log
                    env=env,
                    start_new_session=True,  # Ctrl-C is for the parent; kill reaches what the function started, too
                )
            except OSError as error:  # no program that the system runs
                raise QarlError(f"{what} process could not start: {error}", where) from error

    def wait_ready(self) -> None:
        """Wait for the process's first message: empty, or why it cannot start. Raises QarlError."""
        reason, hint = f"not ready after {START_LIMIT_S:.0f} s", ""
        if self.connection.poll(START_LIMIT_S):
            try:
                reason, hint = self.connection.recv_bytes().decode(), "install what it lacks, or change its settings"
            except (EOFError, OSError):
                reason, hint = how_ended(self.kill()), tail(self._log)
        if reason:
            self.kill()
            kind = KilledError if reason == how_ended(-signal.SIGKILL) else QarlError
            raise kind(f"{self._what} process could not start: {reason}", self._where, hint)

    def kill(self) -> int:
        """End the process, unless it has ended, and all that it started. Returns its exit code, minus the signal's
        number when one ended it."""
        self.connection.close()
        return self.end()

    def end(self) -> int:
        """As `kill`, but the connection stays open: another thread may wait for it, and sees its end."""
        if self.process.returncode is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        return self.process.wait()


C = TypeVar("C", bound=ChildProcess)


class ChildProcesses(ABC, Generic[C]):
    """`number` child processes, one in each slot. Raises ConfigError: one cannot start."""

    def __init__(self, number: int) -> None:
        self._children: list[C] = []
        try:
            for slot in range(number):
                self._children.append(self._start(slot))
            for slot in range(number):
                self._wait_ready(slot)
        except QarlError as error:
            self.close()
            raise ConfigError(error.what, error.where, error.hint) from error

    def _wait_ready(self, slot: int) -> None:
        """A process that was killed from outside while it started, as the system does for memory, starts again."""
        try:
            self._children[slot].wait_ready()
        except KilledError:
            self._replace(slot)

    @abstractmethod
    def _start(self, slot: int) -> C:
        """A new process, which need not be ready."""

    def _replace(self, slot: int) -> C:
        """End the process in `slot`, and start another one there."""
        self._children[slot].kill()
        child = self._children[slot] = self._start(slot)
        child.wait_ready()
        return child

    def close(self) -> None:
        """End all processes."""
        for child in self._children:
            child.kill()
        self._children = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

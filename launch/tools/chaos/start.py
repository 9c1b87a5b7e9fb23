"""One start of a run, all of its processes, and what it writes."""

import os
import subprocess
import time
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

PATIENCE_S = 600.0
"""A run that writes nothing to its logs for so long, after the longest of its own timeouts, hangs."""
LEFT_AFTER_S = 10.0
"""So long after the end of a start its last process is gone."""


class Start:
    """Starts or continues a run. Its processes are known by a variable of their environment.

    Args:
        run: the folder of the run.
        command: what starts it.
        output: the folder for what it prints.
        env: variables besides those of this process.
        cwd: where it is started.
        patience_s: it hangs when it writes nothing to its logs for so long.
    """

    def __init__(
        self,
        run: Path,
        command: Sequence[str],
        output: Path,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self._patience_s = patience_s
        self.run, self._mark = run, ("QARL_TRIED", str(uuid.uuid4()))
        self._began, self._seen = time.time(), set[psutil.Process]()
        self._sizes = {path: path.stat().st_size for path in self.run.glob("**/*") if path.is_file()}
        self._out, self._err = (output / f"{name}-{self._mark[1]}" for name in ("stdout", "stderr"))
        environment = os.environ | (env or {}) | dict([self._mark])
        with self._out.open("w") as out, self._err.open("w") as err:
            self.process = subprocess.Popen(
                command, cwd=cwd, env=environment, stdout=out, stderr=err, start_new_session=True
            )

    def new(self, name: str) -> str:
        """What this start has written to a file of the run folder."""
        path = self.run / name
        if not path.is_file():
            return ""
        with path.open("rb") as file:
            size = self._sizes.get(path, 0)
            file.seek(size if path.stat().st_size >= size else 0)
            return file.read().decode(errors="replace")

    def wrote(self, name: str) -> bool:
        """Whether this start has written a file of the run folder."""
        path = self.run / name
        return path.exists() and path.stat().st_mtime > self._began

    def checkpoints(self) -> list[Path]:
        """The complete ones, oldest first."""
        return sorted(path for path in (self.run / "checkpoints").glob("step_*") if path.suffix != ".part")

    def is_saving(self) -> bool:
        return any((self.run / "checkpoints").glob("*.part"))

    def maps(self, library: str) -> bool:
        try:
            return library in Path(f"/proc/{self.process.pid}/maps").read_text()
        except OSError:
            return False

    def living(self) -> list[psutil.Process]:
        """The processes of this start: its descendants, orphans included."""
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.pid == self.process.pid or self._is_ours(process):
                    self._seen.add(process)
        return [process for process in self._seen if lives(process)]

    def find(self, words: str) -> list[int]:
        """The processes of this start whose command line has `words`; the driver alone for none."""
        if not words:
            return [self.process.pid]
        found = []
        for process in self.living():
            with suppress(psutil.Error):
                if words in " ".join(process.cmdline()):
                    found.append(process.pid)
        return sorted(found)

    def left(self) -> list[psutil.Process]:
        """What still lives `LEFT_AFTER_S` after the driver's end; returns as soon as nothing does."""
        ended = time.monotonic()
        while (left := self.living()) and time.monotonic() - ended < LEFT_AFTER_S:
            time.sleep(0.1)
        return left

    def _is_ours(self, process: psutil.Process) -> bool:
        """Ray's actors write their title over their environment, so a parent that is known tells, too."""
        if process in self._seen or process.parent() in self._seen:
            return True
        return self._mark in process.environ().items()

    def hangs(self) -> bool:
        """Whether it runs, and has written to none of its logs for `patience_s`."""
        files = [*self.run.glob("logs/*"), *self.run.glob("*.jsonl")]
        newest = max([self._began, *(file.stat().st_mtime for file in files)])
        return self.process.poll() is None and time.time() - newest > self._patience_s

    def reaches(self, phase: Callable[[], bool]) -> bool:
        """Wait for `phase`; False when it ends before, or hangs."""
        while not phase():
            if self.process.poll() is not None or self.hangs():
                return False
            time.sleep(0.02)
        return True

    def end(self) -> int | None:
        """Wait for its end; returns the exit code, None when it hangs."""
        while self.process.poll() is None:
            if self.hangs():
                return None
            time.sleep(0.1)
        return self.process.returncode

    def faults_of_end(self, codes: Collection[int], line: str = "") -> list[str]:
        """Wait for its end; returns what is wrong there: it hangs, has none of `codes`, leaves processes, or fails with
        another message than one line that has `line`."""
        code = self.end()
        if code is None:
            return ["hangs"]
        left, lines = self.left(), self.stderr()  # in this order: its guard may have a line, too
        faults = [] if code in codes else [f"exit code {code}"]
        if code > 0 and not (len(lines) == 1 and lines[0].startswith("qarl: ") and line in lines[0]):
            faults.append(f"not one line: {lines[-5:]}")
        return [*faults, f"left are {left}"] if left else faults

    def stderr(self) -> list[str]:
        """The lines of it and of its guard."""
        return self._err.read_text().splitlines()

    def stdout(self) -> str:
        return self._out.read_text()


def lives(process: psutil.Process) -> bool:
    """Whether it runs; one that has ended, and nobody has waited for, does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False

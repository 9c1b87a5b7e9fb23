"""Verifiers in processes of their own, behind a time-out: no verifier can stop, crash or slow down a run."""

import contextlib
import json
import os
import sys
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from time import monotonic
from typing import Any, Self

from qarl.config.run import RewardConfig
from qarl.errors import QarlError
from qarl.logs import log_file
from qarl.types import Sample, Score
from rewards.process import ChildProcess, describe

VERIFIERS = {
    "exact": "rewards.exact:verify",
    "math": "rewards.math:verify",
    "reasoning_gym": "rewards.reasoning_gym:verify",
}
MAX_CHUNK = 32
KILLED = "process was killed by SIGKILL"
"""What the system does to a process when memory is short; the sample is not to blame."""

Numbered = tuple[int, Sample]


class ProcessRewardService:
    """`qarl.protocols.RewardService` over `config.num_workers` verifier processes. Not for concurrent callers.

    A verifier that raises costs its sample the reward; one that hangs is killed after `config.timeout_s`, one that
    dies is replaced. Each such sample gets reward 0 with its reason, and `on_fault` one line that names its prompt.

    Args:
        verifier: "module:function" or "file.py:function" in place of the one that `config` names; called with
            (text, finish_reason, answer, **config.kwargs, **prompt.verifier_kwargs), returns a reward in [0, 1].
        log_dir: folder of the processes' logs; None leaves their output on stderr.

    Raises QarlError: a process cannot start.
    """

    def __init__(
        self,
        config: RewardConfig,
        on_fault: Callable[[str], None],
        *,
        verifier: str | None = None,
        log_dir: Path | None = None,
    ) -> None:
        self._verifier = verifier or config.function or VERIFIERS[config.kind]
        self._kwargs = json.dumps(config.kwargs)
        self._timeout_s = config.timeout_s
        self._on_fault, self._log_dir = on_fault, log_dir
        self._children = [self._start(slot) for slot in range(config.num_workers)]
        try:
            for child in self._children:
                child.wait_ready()
        except QarlError:
            self.close()
            raise

    def score(self, samples: Sequence[Sample]) -> list[Score]:
        """One score per sample, in order. A sample whose process was killed from outside is tried once more.

        Raises QarlError: the service is closed, or a replacement process cannot start.
        """
        if not self._children:
            raise QarlError("the reward service is closed")
        pending = deque(enumerate(samples))
        scores: dict[int, Score] = {}
        killed: set[int] = set()
        try:
            while len(scores) < len(samples):
                for slot, child in enumerate(self._children):
                    if pending and not child.given:
                        self._feed(slot, pending)
                self._collect(pending, scores, killed)
        finally:
            # After an interruption: answers still on their way must not reach the next call.
            for child in self._children:
                if child.given:
                    child.kill()
        return [scores[index] for index in range(len(samples))]

    def _start(self, slot: int) -> "_Child":
        return _Child(self._verifier, self._timeout_s, self._kwargs, log_file(self._log_dir, "verifier", slot))

    def _feed(self, slot: int, pending: deque[Numbered]) -> None:
        """Give the idle child in `slot`, or its replacement, the next samples."""
        child = self._children[slot]
        if child.process.poll() is not None:
            child.kill()
            child = self._start(slot)
            child.wait_ready()
            self._children[slot] = child
        # Half of an equal share: the last chunks are small, so that all children end together.
        size = min(len(pending), MAX_CHUNK, 1 + len(pending) // (2 * len(self._children)))
        child.give([pending.popleft() for _ in range(size)])

    def _collect(self, pending: deque[Numbered], scores: dict[int, Score], killed: set[int]) -> None:
        """Wait for the next answers or time-out and record them; give back what a dead child had not begun."""
        busy = {child.connection: child for child in self._children if child.given}
        ready = wait(busy, max(0.0, min(child.deadline for child in busy.values()) - monotonic()))
        now = monotonic()
        for connection, child in busy.items():
            if connection not in ready and now < child.deadline:
                continue
            (index, sample), *unbegun = child.given
            if connection in ready:
                score = child.receive()
            else:
                child.kill()
                score = Score(0.0, f"timed out after {self._timeout_s} s")
            again = score.error == KILLED and index not in killed
            if again:
                killed.add(index)
                unbegun = [(index, sample), *unbegun]
            else:
                scores[index] = score
            if not child.given:
                pending.extendleft(reversed(unbegun))
            if score.error and not again:
                self._on_fault(f"prompt {sample.prompt.id}: verifier {score.error}; the sample gets reward 0")

    def close(self) -> None:
        """End all processes."""
        for child in self._children:
            child.kill()
        self._children = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class _Child(ChildProcess):
    """One verifier process; `given` are the samples that it has not answered, the first of them due at `deadline`."""

    def __init__(self, verifier: str, timeout_s: float, kwargs: str, log: Path | None) -> None:
        command = [sys.executable, "-P", "-m", "rewards.child", verifier, str(timeout_s), kwargs]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        super().__init__(command, "verifier", verifier, log, env)
        self.timeout_s = timeout_s
        self.given: deque[Numbered] = deque()
        self.deadline = 0.0

    def give(self, chunk: Sequence[Numbered]) -> None:
        self.given.extend(chunk)
        message: list[Any] = [
            (sample.text, sample.finish_reason, sample.prompt.answer, sample.prompt.verifier_kwargs)
            for _, sample in chunk
        ]
        # A child that died this instant shows when its answer is awaited.
        with contextlib.suppress(OSError):
            self.connection.send(message)
        self.deadline = monotonic() + self.timeout_s

    def receive(self) -> Score:
        """The score of the first of `given`; the time of the next one starts."""
        try:
            score = Score(*self.connection.recv())
        except (EOFError, OSError):
            return Score(0.0, f"process {describe(self.kill())}")
        self.given.popleft()
        self.deadline = monotonic() + self.timeout_s
        return score

    def kill(self) -> int:
        """As of every child process; nothing is `given` any more."""
        self.given.clear()
        return super().kill()

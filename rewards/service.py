"""Verifiers in processes of their own, behind a time-out: no verifier can stop, crash or slow down a run."""

import contextlib
import json
import math
import os
import signal
import sys
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from multiprocessing.connection import wait
from pathlib import Path
from time import monotonic
from typing import Any, Literal

from qarl.config.reward import ComponentConfig, RewardConfig
from qarl.errors import DataError, QarlError, how_ended
from qarl.logs import log_file
from qarl.trace import span
from qarl.types import Activity, Prompt, Sample, Score
from rewards.component import Response
from rewards.process import ChildProcess, ChildProcesses

MAX_CHUNK = 32
KILLED = f"process {how_ended(-signal.SIGKILL)}"
"""What the system does to a process when memory is short; the sample is not to blame."""

CHECKING = ("math", "numeric", "code")
"""Kinds that can tell from a row that no response to it can be judged."""
Outcome = list[list[tuple[float, str]]]
"""(reward, error) by component and response of a unit."""


@dataclass(frozen=True)
class Unit:
    """What one call to a verifier process judges: `responses`, numbered `indices`, by the components `numbers`."""

    action: Literal["judge", "check"]
    numbers: tuple[int, ...]
    indices: tuple[int, ...]
    responses: tuple[Response, ...]

    def failed(self, error: str) -> Outcome:
        return [[(0.0, error)] * len(self.indices)] * len(self.numbers)


class ProcessRewardService(ChildProcesses["_Child"]):
    """`qarl.protocols.RewardService` over `config.num_workers` verifier processes. Not for concurrent callers.

    A component that raises counts 0 for its sample; a process that takes longer than `config.timeout_s` a sample is
    killed, one that dies is replaced, and what it judged counts 0. `on_fault` gets a line that names the prompt.

    Args:
        log_dir: folder of the processes' logs; None leaves their output on stderr.

    Raises ConfigError: a process cannot start.
    """

    def __init__(self, config: RewardConfig, on_fault: Callable[[str], None], *, log_dir: Path | None = None) -> None:
        self._config, self._parts = config, config.parts()
        self._on_fault, self._log_dir = on_fault, log_dir
        super().__init__(config.num_workers)

    @span("verifiers/score")
    def score(self, samples: Sequence[Sample]) -> list[Score]:
        """One score per sample, in order. A sample whose process was killed from outside is tried once more.

        Raises QarlError: the service is closed, or a replacement process cannot start.
        """
        responses = [_response(sample) for sample in samples]
        results: list[dict[int, tuple[float, str]]] = [{} for _ in samples]
        units = list(self._units("judge", responses))
        for unit, outcome in zip(units, self._run(units), strict=True):
            for number, judged in zip(unit.numbers, outcome, strict=True):
                for index, result in zip(unit.indices, judged, strict=True):
                    results[index][number] = result
        return [self._total(sample.prompt, result) for sample, result in zip(samples, results, strict=True)]

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raises DataError: no component judges a row, or the answer of a row cannot be judged by."""
        rows = [_row(prompt) for prompt in prompts]
        for row in rows:
            if not any(_judges(part, row) for part in self._parts):
                what = f"no component judges rows of data_source '{row.source}'"
                raise DataError(what, "reward.components", "name it among the sources of one")
        units = list(self._units("check", rows))
        faults = [
            (self._parts[number].label, unit.responses[0], error)
            for unit, outcome in zip(units, self._run(units), strict=True)
            for number, [(_, error)] in zip(unit.numbers, outcome, strict=True)
            if error
        ]
        if faults:
            name, row, error = faults[0]
            others = f" ({len(faults)} rows in all)" if len(faults) > 1 else ""
            where = f"row '{' '.join(row.prompt.split())[:60]}'"
            raise DataError(f"reward '{name}': {error}{others}", where, "mend or remove the row")

    def doing(self) -> list[Activity]:
        """What each verifier does. Any thread may call this."""
        return [Activity("judging" if child.given else "idle") for child in list(self._children)]

    def _units(self, action: Literal["judge", "check"], responses: Sequence[Response]) -> Iterator[Unit]:
        """Components that judge equally many responses at once work on the same unit."""
        by_size: dict[int, list[int]] = defaultdict(list)
        for number, part in enumerate(self._parts):
            if action == "judge" or part.kind in CHECKING:
                by_size[part.at_once if action == "judge" else 1].append(number)
        for size, numbers in by_size.items():
            alike: dict[tuple[int, ...], list[int]] = defaultdict(list)
            for index, response in enumerate(responses):
                alike[tuple(n for n in numbers if _judges(self._parts[n], response))].append(index)
            for chosen, indices in alike.items():
                for unit in _groups(indices, responses) if size == 0 else _slices(indices, size):
                    if chosen:
                        yield Unit(action, chosen, tuple(unit), tuple(responses[index] for index in unit))

    def _total(self, prompt: Prompt, results: dict[int, tuple[float, str]]) -> Score:
        """The weighted sum, and the success: of the component that the config names, or of the first one."""
        values = {self._parts[number].label: value for number, (value, _) in results.items()}
        errors = {self._parts[number].label: error for number, (_, error) in results.items() if error}
        deciding = self._config.success or (self._parts[min(results)].label if results else "")
        success = values.get(deciding, 0.0)
        if not 0.0 <= success <= 1.0:
            errors[deciding] = f"gave {success:g}, and a success is in [0, 1]"
            success = values[deciding] = 0.0
        for name, error in errors.items():
            self._on_fault(f"prompt {prompt.id}: reward '{name}' {error}; it counts 0")
        total = sum(part.weight * values.get(part.label, 0.0) for part in self._parts)
        columns = {part.label: values.get(part.label, math.nan) for part in self._parts}
        return Score(total, next(iter(errors.values()), ""), success, columns)

    def _run(self, units: Sequence[Unit]) -> list[Outcome]:
        """The outcome of each unit, in order."""
        if not self._children:
            raise QarlError("the reward service is closed")
        pending = deque(enumerate(units))
        outcomes: dict[int, Outcome] = {}
        killed: set[int] = set()
        try:
            while len(outcomes) < len(units):
                for slot, child in enumerate(self._children):
                    if pending and not child.given:
                        self._feed(slot, pending)
                self._collect(pending, outcomes, killed)
        finally:
            # After an interruption: answers still on their way must not reach the next call.
            for child in self._children:
                if child.given:
                    child.kill()
        return [outcomes[number] for number in range(len(units))]

    def _start(self, slot: int) -> "_Child":
        return _Child(self._parts, self._config.timeout_s, log_file(self._log_dir, "verifier", slot))

    def _feed(self, slot: int, pending: "deque[Numbered]") -> None:
        """Give the idle child in `slot`, or its replacement, the next units."""
        child = self._children[slot]
        if child.process.poll() is not None:
            child = self._replace(slot)
        # Half of an equal share: the last chunks are small, so that all children end together.
        size = min(len(pending), MAX_CHUNK, 1 + len(pending) // (2 * len(self._children)))
        child.give([pending.popleft() for _ in range(size)])

    def _collect(self, pending: "deque[Numbered]", outcomes: dict[int, Outcome], killed: set[int]) -> None:
        """Wait for the next answers or time-out and record them; give back what a dead child had not begun."""
        busy = {child.connection: child for child in self._children if child.given}
        ready = wait(busy, max(0.0, min(child.deadline for child in busy.values()) - monotonic()))
        now = monotonic()
        for connection, child in busy.items():
            if connection not in ready and now < child.deadline:
                continue
            (number, unit), *unbegun = child.given
            if connection in ready:
                outcome = child.receive()
            else:
                child.kill()
                outcome = unit.failed(f"timed out after {self._config.timeout_s * len(unit.indices):g} s")
            if outcome == unit.failed(KILLED) and number not in killed:
                killed.add(number)
                unbegun = [(number, unit), *unbegun]
            else:
                outcomes[number] = outcome
            if not child.given:
                pending.extendleft(reversed(unbegun))


Numbered = tuple[int, Unit]


class _Child(ChildProcess):
    """One verifier process; `given` are the units that it has not answered, the first of them due at `deadline`."""

    def __init__(self, parts: Sequence[ComponentConfig], timeout_s: float, log: Path | None) -> None:
        components = json.dumps([(part.kind, part.full_settings().model_dump()) for part in parts])
        command = [sys.executable, "-P", "-m", "rewards.child", components, str(timeout_s)]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        where = ", ".join(part.settings.get("function", part.label) for part in parts)
        super().__init__(command, "verifier", where, log, env)
        self.timeout_s = timeout_s
        self.given: deque[Numbered] = deque()
        self.deadline = 0.0

    def give(self, chunk: Sequence[Numbered]) -> None:
        self.given.extend(chunk)
        message: list[Any] = [(unit.action, unit.numbers, unit.responses) for _, unit in chunk]
        # A child that died this instant shows when its answer is awaited.
        with contextlib.suppress(OSError):
            self.connection.send(message)
        self._start_clock()

    def receive(self) -> Outcome:
        """The outcome of the first of `given`; the time of the next one starts."""
        unit = self.given[0][1]
        try:
            outcome: Outcome = self.connection.recv()
        except (EOFError, OSError):
            return unit.failed(f"process {how_ended(self.kill())}")
        self.given.popleft()
        self._start_clock()
        return outcome

    def _start_clock(self) -> None:
        responses = len(self.given[0][1].indices) if self.given else 0
        self.deadline = monotonic() + self.timeout_s * responses

    def kill(self) -> int:
        """As of every child process; nothing is `given` any more."""
        self.given.clear()
        return super().kill()


def _groups(indices: Sequence[int], responses: Sequence[Response]) -> Iterator[Sequence[int]]:
    """Neighbours that answer the same prompt."""
    for _, group in groupby(indices, lambda index: responses[index].prompt_id):
        yield list(group)


def _slices(indices: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(indices), size):
        yield indices[start : start + size]


def _judges(part: ComponentConfig, response: Response) -> bool:
    return not part.sources or response.source in part.sources


def _row(prompt: Prompt) -> Response:
    """A row as a response without text."""
    rest = (prompt.source, prompt.metadata, prompt.verifier_kwargs)
    return Response(prompt.id, prompt.text, "", (), "", prompt.answers, *rest)


def _response(sample: Sample) -> Response:
    prompt = sample.prompt
    rest = (prompt.source, prompt.metadata, prompt.verifier_kwargs)
    ids, reason = sample.response_ids, sample.finish_reason
    if sample.sampled_T is not None:
        ids = tuple(token for token, sampled in zip(ids, sample.sampled_T, strict=True) if sampled)
    return Response(prompt.id, prompt.text, sample.text, ids, reason, prompt.answers, *rest)

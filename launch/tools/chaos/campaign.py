"""`qarl chaos`: real runs, faults at random points of them, and what they come to."""

import json
import math
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import psutil

from launch.run.files import write_whole
from launch.tools.chaos.checks import differences, lost_and_doubled
from launch.tools.chaos.faults import FAULTS, JITTER_S, PHASES, STARTING_S
from launch.tools.chaos.start import PATIENCE_S, Start
from qarl.errors import ConfigError, QarlError, first_line

RESULTS_FILE = "results.jsonl"
SETTINGS_FILE = "settings.json"
MIB = 2**20


@dataclass
class Outcome:
    """What came of one fault, or with no `kind` of the whole run, which may be one that did not end."""

    run: str
    kind: str
    phase: str
    problems: list[str]
    lost: dict[str, int] = field(default_factory=dict)
    doubled: dict[str, int] = field(default_factory=dict)
    has_ended: bool = True

    @property
    def is_right(self) -> bool:
        return not (self.problems or self.lost or self.doubled)


@dataclass
class Campaign:
    """Runs in `folder`, one after the other; each is started again until it has ended. A further call goes on; a run
    that was cut off with the campaign does not count.

    Attributes:
        command: what starts or continues the run in a folder.
        settings: the config of the runs, by key; a folder has runs of one config and seed.
        faults: how many are injected in all; those of earlier calls count.
        seconds: after so many no further fault is injected; the last run still goes to its end.
        is_exact: whether every run must end with the bits of the undisturbed one.
        kinds: names of `FAULTS`.
    """

    folder: Path
    command: Callable[[Path], Sequence[str]]
    settings: Mapping[str, Any]
    faults: int
    seconds: float = math.inf
    seed: int = 0
    is_exact: bool = True
    kinds: Sequence[str] = tuple(FAULTS)
    outcomes: list[Outcome] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self._is_free():
            raise ConfigError("holds something else than a campaign", f"--folder {self.folder}", "name a new folder")
        self._check_settings()
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(self.folder / SETTINGS_FILE, json.dumps(self._own_settings))
        self._began, self._file = time.monotonic(), self.folder / RESULTS_FILE
        if self._file.exists():
            found = [Outcome(**json.loads(line)) for line in self._file.read_text().splitlines()]
            whole = {outcome.run for outcome in found if not outcome.kind}
            self.outcomes = [outcome for outcome in found if outcome.run in whole]
        self._injected = sum(bool(outcome.kind) for outcome in self.outcomes)

    def run(self) -> Iterator[str]:
        """Inject the faults; yields a line for each, and for each run."""
        yield f"{self.folder / 'undisturbed'}: first, nobody disturbs this run"
        reference = self._undisturbed()
        begun = [path.name for path in self.folder.glob("run-*")]
        for name in sorted(set(begun) - {outcome.run for outcome in self.outcomes}):
            yield f"{name}: cut off with the campaign, its faults do not count"
        number = max((int(name[4:]) for name in begun), default=0)
        while self._has_more():
            number += 1
            name = f"run-{number}"
            run, size = self.folder / name / "runs" / "chaos", _size(reference)
            with own_disk(run.parent, 2 * size + 64 * MIB):
                for outcome in self._disturb(run, name, reference):
                    if not outcome.is_right:  # for whoever looks for the reason
                        shutil.copytree(run.parent, self.folder / name / "kept", dirs_exist_ok=True)
                    self.outcomes.append(outcome)
                    with self._file.open("a") as file:
                        file.write(json.dumps(asdict(outcome)) + "\n")
                    told = [*outcome.problems, *(f"lost {what} ({n})" for what, n in outcome.lost.items())]
                    told += [f"doubled {what} ({n})" for what, n in outcome.doubled.items()]
                    what = f"{outcome.kind}, {outcome.phase}" if outcome.kind else "the whole run"
                    yield f"{name}: {what}: {'; '.join(told) or 'right'}"

    def summary(self) -> dict[str, Any]:
        """Counts for each kind, and of all; a fault is survived when its run ended right, too."""
        runs = [outcome for outcome in self.outcomes if not outcome.kind]
        right = {outcome.run for outcome in runs if outcome.is_right}
        kinds: dict[str, dict[str, Any]] = {
            kind: {
                "injected": len(of_kind := [outcome for outcome in self.outcomes if outcome.kind == kind]),
                "survived": sum(outcome.is_right and outcome.run in right for outcome in of_kind),
                "phases": dict(Counter(outcome.phase for outcome in of_kind)),
            }
            for kind in FAULTS
        }
        total = {key: sum(counts[key] for counts in kinds.values()) for key in ("injected", "survived")}
        total |= {key: sum(sum(getattr(run, key).values()) for run in runs) for key in ("lost", "doubled")}
        phases = dict(Counter(outcome.phase for outcome in self.outcomes if outcome.kind))
        counts = {"runs": len(runs), "runs_right": len(right), "runs_not_ended": sum(not run.has_ended for run in runs)}
        return {"kinds": kinds, "phases": phases, "all": total, **counts}

    @property
    def patience_s(self) -> float:
        """A run that hangs ends, or goes on, after a timeout of its config: the campaign waits for longer."""
        timeouts = [seconds for key, seconds in self.settings.items() if key.endswith("timeout_s")]
        return PATIENCE_S + max(timeouts, default=0.0)

    @property
    def _own_settings(self) -> dict[str, Any]:
        return {"--seed": self.seed, **self.settings}

    def _check_settings(self) -> None:
        """Raises ConfigError: the runs of the folder have other settings, or such that are not known."""
        file, where, hint = self.folder / SETTINGS_FILE, f"--folder {self.folder}", "name a new folder"
        if file.exists():
            old, new = json.loads(file.read_text()), json.loads(json.dumps(self._own_settings))
            changed = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
            if changed:
                told = ", ".join(f"{key}={old.get(key)}" for key in changed[:4])
                raise ConfigError(f"was begun with other settings ({told})", where, f"use them, or {hint}")
        elif self.folder.exists() and any(self.folder.iterdir()):
            raise ConfigError(f"has runs, but no {SETTINGS_FILE}: their settings are not known", where, hint)

    def _is_free(self) -> bool:
        """Whether the folder is new, empty, or of an earlier call."""
        if not self.folder.exists():
            return True
        names = {path.name for path in self.folder.iterdir()} if self.folder.is_dir() else {"a file"}
        return not names or bool(names & {"undisturbed", RESULTS_FILE, SETTINGS_FILE})

    def _has_more(self) -> bool:
        return self._injected < self.faults and time.monotonic() - self._began < self.seconds

    def _start(self, run: Path) -> Start:
        return Start(run, self.command(run), run.parent.parent, patience_s=self.patience_s)

    def _undisturbed(self) -> Path:
        run = self.folder / "undisturbed" / "runs" / "chaos"
        if not (run / "summary.json").exists():
            run.parent.mkdir(parents=True, exist_ok=True)
            start = self._start(run)
            with ending(start):
                faults = start.faults_of_end([0])
            if faults:
                what = f"undisturbed: {'; '.join(faults)}: {start.stderr()[-1:]}"
                raise QarlError(what, str(run), "make it run first")
        return run

    def _disturb(self, run: Path, name: str, reference: Path) -> Iterator[Outcome]:
        """Start the run again and again until it has ended."""
        rng = Random(f"{self.seed} {name}")
        while True:
            start = self._start(run)
            last, codes = None, {0}
            with ending(start):
                while self._has_more() and (fault := self._inject(start, rng, is_first=last is None)):
                    self._injected += 1
                    if last:
                        yield last
                    last = Outcome(name, *fault, problems=[])
                    codes |= set(FAULTS[last.kind].codes)  # the start may still end with an earlier one
                problems, code = start.faults_of_end(codes), start.process.returncode
            if last:
                last.problems += problems
                yield last
            if code == 0:
                problems = [] if last else problems
                problems += differences(run, reference) if self.is_exact else []
                yield Outcome(name, "", "", problems, *lost_and_doubled(run, reference))
                return
            if not last:
                what = f"does not resume: code {code}, {start.stderr()[-1:] if code is not None else 'hangs'}"
                yield Outcome(name, "", "", [what], has_ended=False)
                return

    def _inject(self, start: Start, rng: Random, is_first: bool) -> tuple[str, str] | None:
        """The kind and phase of the next fault, once it is injected; None where the start ends before, or hangs."""
        while True:
            kind = rng.choice(self.kinds)
            phase = rng.choice(list(PHASES)[0 if is_first else 1 :])
            if not start.reaches(PHASES[phase](start)):
                return None
            time.sleep(rng.uniform(0, STARTING_S if phase == "starting" else JITTER_S))
            if start.process.poll() is None and FAULTS[kind].inject(start, rng):
                return kind, phase


def table(summary: Mapping[str, Any]) -> str:
    """The summary for a person."""
    lines = [f"{'':20s}{'injected':>9s}{'survived':>9s}  by phase"]
    rows = {**summary["kinds"], "all": {**summary["all"], "phases": summary["phases"]}}
    for kind, counts in rows.items():
        phases = ", ".join(f"{phase} {count}" for phase, count in sorted(counts["phases"].items()))
        lines.append(f"{kind:20s}{counts['injected']:9d}{counts['survived']:9d}  {phases}".rstrip())
    total = summary["all"]
    lines.append(f"steps, responses and draws: {total['lost']} lost, {total['doubled']} doubled")
    lines.append(f"runs: {summary['runs']}, {summary['runs_right']} of them right")
    lines.append(f"runs that did not end, in which nothing of this is counted: {summary['runs_not_ended']}")
    return "\n".join(lines)


@contextmanager
def ending(start: Start) -> Iterator[None]:
    """No process of a start outlives this block, also when the campaign itself is interrupted."""
    try:
        yield
    finally:
        for process in start.living():
            with suppress(psutil.NoSuchProcess):
                process.kill()
        start.process.wait()
        start.left()  # nothing else may hold files of its disk


@contextmanager
def own_disk(folder: Path, size: int) -> Iterator[None]:
    """Give `folder` a disk of `size` bytes of its own, in memory, where this user may mount one."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True).returncode == 0
    try:
        yield
    finally:
        if mounted:
            freed = subprocess.run(["umount", str(folder)], capture_output=True, text=True)
            if freed.returncode:
                raise QarlError(f"cannot be unmounted: {first_line(freed.stderr)}", str(folder), "end what uses it")


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())

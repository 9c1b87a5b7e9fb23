"""`qarl study`: arms of one experiment, several seeds of each, every one an ordinary `qarl train` in its own process.

A run that diverges or fails is an outcome like any other. A run that has ended is not run again.
"""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from launch.run.curves import Series
from launch.run.files import SUMMARY_FILE
from launch.run.report import read_series, read_summary
from launch.run.resume import CONFIG_FILE, check_same_run
from launch.run.tracking import METRICS_FILE
from launch.tools.child import child
from qarl.config.base import NAME_PATTERN, Fraction, Node
from qarl.config.io import load_config, read_tree, validate_as
from qarl.config.run import Config
from qarl.errors import ConfigError, DivergenceError

RUNS = "runs/studies"
LOG_FILE = "train.log"
FAILURE_FILE = "failure.json"
"""In the folder of a run that did not end well: its exit code and its last line."""

Status = Literal["done", "diverged", "failed", "not run"]
PlainName = Annotated[str, Field(pattern=NAME_PATTERN)]


class StudyConfig(Node):
    """One experiment: what is compared, and what is shown of it."""

    question: str = Field(default=...)
    """The question of the study; the report begins with it."""
    base: str = Field(default=...)
    """Config that every run starts from, relative to this file."""
    overrides: list[str] = []
    """`a.b=c` items of every run."""
    parts: dict[PlainName, list[str]] = {}
    """Name -> `a.b=c` items that several arms share."""
    arms: Annotated[dict[PlainName, list[str]], Field(min_length=1)] = Field(default=...)
    """What is compared: name -> `a.b=c` items and names of `parts`, which come after `overrides`."""
    seeds: Annotated[list[int], Field(min_length=1)] = [0, 1, 2]
    """Each arm is run once with each."""
    comparisons: dict[str, list[str]] = {}
    """Title -> arms: a table and a figure each. Empty compares all arms at once."""
    accuracy: str = "eval/pass@1"
    """The metric that an arm is judged by: held-out accuracy, in [0, 1]."""
    reach: Fraction | None = None
    """Count the rollouts until this accuracy; null takes the highest that all arms of a comparison reach."""
    collapse_margin: Fraction = 0.1
    """A run that ends this much below its start or its best has collapsed; larger than the noise of an evaluation."""
    curves: list[str] = ["reward/mean", "eval/pass@1", "mismatch/k3_kl", "actor/clip_fraction"]
    """Metrics drawn over steps."""
    means: list[str] = []
    """Metrics whose mean over all steps is a column of the table."""
    time_shares: list[str] = []
    """Timing metrics whose share of the step time is a column of the table."""

    def items(self, arm: str) -> list[str]:
        """The `a.b=c` items of an arm, its parts expanded."""
        return [item for name in self.arms[arm] for item in ([name] if "=" in name else self.parts[name])]

    def contradictions(self) -> Iterator[str]:
        for arm, names in self.arms.items():
            if unknown := [name for name in names if "=" not in name and name not in self.parts]:
                yield f"arms.{arm}: no part is called {', '.join(unknown)}"
        for title, arms in self.comparisons.items():
            if unknown := [arm for arm in arms if arm not in self.arms]:
                yield f"comparisons.{title}: no arm is called {', '.join(unknown)}"
        for item in [item for items in (self.overrides, *self.parts.values(), *self.arms.values()) for item in items]:
            if item.startswith(("run.", "seed=")):
                yield f"{item}: the study itself sets run.name, run.dir and seed"


@dataclass(frozen=True)
class Study:
    """A study file, read, with the requested arms and seeds."""

    name: str
    path: Path
    config: StudyConfig
    arms: tuple[str, ...]
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class PlannedRun:
    """One run: what `qarl train` is called with, and the config that this gives."""

    arm: str
    seed: int
    command: tuple[str, ...]
    config: Config

    @property
    def folder(self) -> Path:
        return self.config.run.folder


@dataclass(frozen=True)
class RunResult:
    """The outcome of a run, and every metric that it logged; `reason` says why it did not end well."""

    arm: str
    seed: int
    status: Status
    reason: str
    series: Series


def load_study(path: Path, arms: Sequence[str] = (), seeds: Sequence[int] = ()) -> Study:
    """Read a study file; `arms` and `seeds` choose among its own (no choice: all; other seeds are allowed).

    Raises ConfigError: file missing, not YAML, unknown key, wrong type, no such arm.
    """
    config = validate_as(StudyConfig, read_tree(path), str(path))  # `${seed}` is for the runs to resolve
    if unknown := [arm for arm in arms if arm not in config.arms]:
        raise ConfigError(f"no arm is called {', '.join(unknown)}", str(path), f"known: {', '.join(config.arms)}")
    return Study(path.stem, path, config, tuple(arms or config.arms), tuple(seeds or config.seeds))


def plan(study: Study) -> list[PlannedRun]:
    """Every run, seed by seed, so that a study that is stopped early has all arms. Raises ConfigError."""
    return [_plan_run(study, arm, seed) for seed in study.seeds for arm in study.arms]


def _plan_run(study: Study, arm: str, seed: int) -> PlannedRun:
    base = study.path.parent / study.config.base
    name = f"run.name={study.name}-{arm}-seed{seed}"
    own = [f"seed={seed}", name, f"run.dir={RUNS}/{study.name}", f"tracking.wandb_group={study.name}"]
    overrides = [*study.config.overrides, *study.config.items(arm), *own]
    try:
        run = PlannedRun(arm, seed, (str(base), *overrides), load_config(base, overrides))
    except ConfigError as error:
        raise ConfigError(error.what, f"{study.path}, arm {arm}", error.hint) from error
    if not (run.folder / CONFIG_FILE).exists():
        return run
    from launch.machine import with_counts  # late: it imports torch

    try:
        check_same_run(with_counts(run.config), run.folder)
    except ConfigError as error:
        raise ConfigError(error.what, hint="remove the folder to make that run again") from error
    return run


def run_study(runs: Sequence[PlannedRun], log: Callable[[str], None] = print) -> None:
    """Run every planned run that has not ended, one after the other; `results` reads their outcomes."""
    for number, run in enumerate(runs, start=1):
        where = f"[{number}/{len(runs)}] {run.config.run.name}"
        if has_ended(run):
            log(f"{where}: has ended before")
            continue
        log(f"{where}: running, see {run.folder / LOG_FILE}")
        _train(run)
        log(f"{where}: {': '.join(filter(None, _status(run)))}")


def has_ended(run: PlannedRun) -> bool:
    """Whether the run is done, or has diverged: it is not run again."""
    return _status(run)[0] in {"done", "diverged"}


def results(runs: Sequence[PlannedRun]) -> Iterator[RunResult]:
    """The outcome of each run, read from its folder."""
    for run in runs:
        log = run.folder / METRICS_FILE
        series = read_series(run.folder) if log.is_file() and log.stat().st_size else {}
        yield RunResult(run.arm, run.seed, *_status(run), series)


def _status(run: PlannedRun) -> tuple[Status, str]:
    """The outcome of the run, and its reason."""
    failure = run.folder / FAILURE_FILE
    if failure.is_file():
        code, reason = json.loads(failure.read_text())
        return ("diverged" if code == DivergenceError.exit_code else "failed"), reason
    if not (run.folder / SUMMARY_FILE).is_file() or read_summary(run.folder).steps < run.config.train.steps:
        return "not run", ""
    return "done", ""


def _train(run: PlannedRun) -> None:
    """One `qarl train` in a process of its own; leaves `failure.json` when it does not end well."""
    run.folder.mkdir(parents=True, exist_ok=True)
    log, failure = run.folder / LOG_FILE, run.folder / FAILURE_FILE
    failure.unlink(missing_ok=True)
    command = [sys.executable, "-u", "-m", "launch.cli", "train", *run.command]
    with child(command, log) as process:  # an interrupted run shuts its actors down; the next call continues it
        code = process.wait()
    if code:
        failure.write_text(json.dumps([code, _last_line(log)]))


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").split("\n")
    return next((line.strip().removeprefix("qarl: ") for line in reversed(lines) if line.strip()), "no output")

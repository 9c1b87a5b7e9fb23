"""The runs that a folder holds, and how far each got."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import RenderableType
from rich.table import Table

from launch.run.files import SUMMARY_FILE, is_locked
from launch.run.resume import CONFIG_FILE
from launch.run.tracking import METRICS_FILE, number, read_log
from qarl.config.io import read_tree
from qarl.config.run import TrainConfig
from qarl.errors import ConfigError, DataError

DEPTH = 3
"""Folders of runs within folders, such as those of studies."""
STYLES = {"running": "green", "stopped": "yellow", "done": "", "damaged": "red"}


@dataclass(frozen=True)
class ListedRun:
    """`state` is "running", "done", or "stopped": it has not ended, and no process works on it on this machine.

    It is "damaged" where config or metrics cannot be read: no other figure of the run is known but its age.
    `accuracy` is the newest `eval/pass@1`, None before the first evaluation; `age_s` are the seconds since its last row
    of metrics, or since its start.
    """

    name: str
    state: str
    step: int
    steps: int
    accuracy: float | None
    age_s: float


def find_runs(folder: Path) -> list[ListedRun]:
    """The run that `folder` is, and every run below it, the one that logged last first."""
    patterns = ["/".join(["*"] * depth + [CONFIG_FILE]) for depth in range(DEPTH + 1)]
    paths = [file.parent for pattern in patterns for file in folder.glob(pattern)]
    found = [_listed(path, folder) for path in paths if not path.name.startswith(".")]
    return sorted(found, key=lambda run: run.age_s)


def _listed(path: Path, folder: Path) -> ListedRun:
    name = path.name if path == folder else str(path.relative_to(folder))
    config, metrics = path / CONFIG_FILE, path / METRICS_FILE
    summary = path / SUMMARY_FILE
    try:
        rows = read_log(metrics)
        accuracies = [number(row["eval/pass@1"], str(metrics)) for row in rows if "eval/pass@1" in row]
        train = read_tree(config).get("train")
        step = max((row["step"] for row in rows), default=0)
        # A run that was given more steps, and has not done them, still has the summary of before.
        is_done = summary.is_file() and number(read_tree(summary).get("steps", step), str(summary)) >= step
    except (ConfigError, DataError):
        file = metrics if metrics.is_file() else config
        return ListedRun(name, "damaged", 0, 0, None, max(0.0, time.time() - file.stat().st_mtime))
    file = metrics if rows else config
    steps = train.get("steps") if isinstance(train, dict) else None
    return ListedRun(
        name=name,
        state="running" if is_locked(path) else "done" if is_done else "stopped",
        step=step,
        steps=steps if isinstance(steps, int) else TrainConfig().steps,
        accuracy=accuracies[-1] if accuracies else None,
        age_s=max(0.0, time.time() - file.stat().st_mtime),
    )


def render_runs(runs: Sequence[ListedRun]) -> RenderableType:
    """The runs as a table for the terminal."""
    if not runs:
        return "no runs"
    table = Table(box=SIMPLE_HEAD, header_style="dim", show_edge=False)
    for name in ("run", "state", "step", "accuracy", "last row"):
        table.add_column(name, justify="left" if name in ("run", "state") else "right", overflow="fold")
    for run in runs:
        accuracy = "-" if run.accuracy is None else f"{run.accuracy:.3f}"
        age = f"{timedelta(seconds=round(run.age_s))} ago"
        style = STYLES[run.state]
        state = f"[{style}]{run.state}[/{style}]" if style else run.state
        step = "-" if run.state == "damaged" else f"{run.step}/{run.steps}"
        table.add_row(run.name, state, step, accuracy, age)
    return table

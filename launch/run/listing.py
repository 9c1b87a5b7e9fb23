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

DEPTH = 3
"""Folders of runs within folders, such as those of studies."""
STYLES = {"running": "green", "stopped": "yellow", "done": ""}


@dataclass(frozen=True)
class ListedRun:
    """`state` is "running", "done", or "stopped": it has not ended, and no process works on it on this machine.

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
    """Every run below `folder`, the one that logged last first. Raises DataError: the metrics of one are damaged."""
    patterns = ["/".join(["*"] * depth + [CONFIG_FILE]) for depth in range(1, DEPTH + 1)]
    paths = [file.parent for pattern in patterns for file in folder.glob(pattern)]
    found = [_listed(path, folder) for path in paths if not path.name.startswith(".")]
    return sorted(found, key=lambda run: run.age_s)


def _listed(path: Path, folder: Path) -> ListedRun:
    state = "done" if (path / SUMMARY_FILE).is_file() else "stopped"
    rows = read_log(path / METRICS_FILE)
    accuracies = [number(row["eval/pass@1"], f"{path / METRICS_FILE}") for row in rows if "eval/pass@1" in row]
    file = path / METRICS_FILE if rows else path / CONFIG_FILE
    train = read_tree(path / CONFIG_FILE).get("train")
    steps = train.get("steps") if isinstance(train, dict) else None
    return ListedRun(
        name=str(path.relative_to(folder)),
        state="running" if is_locked(path) else state,
        step=max((row["step"] for row in rows), default=0),
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
        table.add_row(run.name, state, f"{run.step}/{run.steps}", accuracy, age)
    return table

"""Runs side by side in the terminal: how far each got, its figures, and the settings in which they differ."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from launch.run.metric_table import HELD_OUT
from launch.run.page.build import wilson
from launch.run.report import final_summary, mismatch_text, read_series, run_names
from launch.run.resume import CONFIG_FILE
from qarl.config.io import read_tree

RECENT = 10
"""Steps over whose rewards the last mean is taken."""
OWN = ("run.", "tracking.")
"""Settings that say nothing of what a run does."""
LABEL_WIDTH, RUN_WIDTH = 34, 22
"""Columns of the terminal for the names of the rows, and for a run at least: of more runs there are more tables."""

LONGEST = 60
"""Characters of a setting's value; more are cut."""

Points = Mapping[int, float]
"""Step -> value."""


@dataclass(frozen=True)
class ComparedRun:
    """What is shown of one run, as text by row; `settings` is its whole config."""

    name: str
    figures: Mapping[str, str]
    settings: Mapping[str, Any]


def compare(run_dirs: Sequence[Path]) -> list[ComparedRun]:
    """Raises ConfigError, DataError: one is no folder of a run, or its config or metrics cannot be read."""
    summaries = [final_summary(path) for path in run_dirs]
    found = []
    for name, path, summary in zip(run_names(run_dirs, summaries), run_dirs, summaries, strict=True):
        series, settings = read_series(path), read_tree(path / CONFIG_FILE)
        last = max(max(points) for points in series.values())
        state = {"steps": f"{last:,}" if summary else f"{last:,}, not ended"}
        found.append(ComparedRun(name, state | _figures(series), settings))
    return found


def _figures(series: Mapping[str, Points]) -> dict[str, str]:
    """The figures that the metrics tell."""
    found = {}
    for name, label in {"eval/pass@1": "held-out pass@1, last", "eval/greedy": "held-out greedy, last"}.items():
        if points := series.get(name):
            step = max(points)
            count = series.get(HELD_OUT, {}).get(step, 0)
            low_high = "" if count < 1 else " ({:.3f} to {:.3f})".format(*wilson(points[step], count))
            found[label] = f"{points[step]:.3f}{low_high}"
    if points := series.get("reward/mean"):
        found[f"reward, last {RECENT} steps"] = f"{fmean(list(points.values())[-RECENT:]):.3f}"
    if points := series.get("mismatch/logp_abs_max"):
        found["largest |d log p|, all steps"] = mismatch_text(float(np.max(list(points.values()))))  # keeps NaN
    if points := series.get("mismatch/unaligned_logp_abs_mean"):
        found["mean |d log p|, unaligned"] = mismatch_text(fmean(points.values()))
    if points := series.get("timing_s/step"):
        found["seconds of a step, median"] = f"{median(points.values()):.3g}"
    if points := series.get("perf/tokens_per_s"):
        found["tokens/s, median"] = f"{median(points.values()):,.0f}"
    return found


def differing(settings: Sequence[Mapping[str, Any]], prefix: str = "") -> dict[str, list[str]]:
    """Key -> value of each run. A section that one of them lacks is one value."""
    found = dict[str, list[str]]()
    for key in dict.fromkeys(key for tree in settings for key in tree):
        values = [tree.get(key, "-") for tree in settings]
        if all(isinstance(value, dict) for value in values):
            found |= differing(values, f"{prefix}{key}.")
        elif any(value != values[0] for value in values) and not f"{prefix}{key}.".startswith(OWN):
            found[f"{prefix}{key}"] = [_short(value) for value in values]
    return found


def _short(value: Any) -> str:
    text = f"{len(value)} settings" if isinstance(value, dict) else str(value)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


def render_comparison(runs: Sequence[ComparedRun], width: int) -> RenderableType:
    """A column for each run, in as many tables as `width` needs."""
    changed = differing([run.settings for run in runs])
    figures = list(dict.fromkeys(label for run in runs for label in run.figures))
    size = max(1, (width - LABEL_WIDTH) // RUN_WIDTH)
    tables: list[RenderableType] = []
    for start in range(0, len(runs), size):
        table = Table(box=SIMPLE_HEAD, header_style="dim", show_edge=False)
        for name in ("", *(run.name for run in runs[start : start + size])):
            table.add_column(Text(name), overflow="fold")
        rows = [(label, [run.figures.get(label, "-") for run in runs]) for label in figures]
        for label, cells in [*rows, ("", []), *changed.items()]:
            table.add_row(*map(Text, (label, *cells[start : start + size])))
        tables.append(table)
    return Group(*tables, "" if changed else "No setting differs.")

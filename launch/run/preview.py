"""A workspace as a page that needs no W&B: its sections and panels, with the values in a run's own W&B files.

Our charting library draws them, not W&B's: the page shows what is in each panel, its axes and its size, not its looks.
"""

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import wandb_workspaces.reports.v2 as reports

from launch.run.page.build import PageRun, build_page
from qarl.errors import DataError

MAX_ROWS = 50
"""Rows of a table in the page: the last ones."""


def preview(workspace: Any, run_dir: Path) -> str:
    """The page. Raises DataError: the run has no W&B files, or W&B cannot read them."""
    history = list(_history(run_dir))
    panels = [
        {"section": part.name, "wide": part.layout_settings.columns == 1, **_panel(panel, history)}
        for part in workspace.sections
        for panel in part.panels
    ]
    series = {name: points for panel in panels for name, points in panel.pop("series", {}).items()}
    empty = [(panel["title"], panel["section"]) for panel in panels if not panel["lines"] and not panel["rows"]]
    tables = [("Panels without data", ("panel", "section"), empty)] if empty else []
    lead = f"{len(panels)} panels; {len(empty)} of them have no data in this run's W&B files"
    run = PageRun(run_dir.name, lead, series, tables, {}, [])
    return build_page([run], f"W&B workspace {workspace.name}", panels)


def _history(run_dir: Path) -> Iterator[Mapping[str, Any]]:
    """What the run logged, call by call, with the rows of a table in place of its file's name."""
    found = sorted((run_dir / "wandb").glob("*run-*/run-*.wandb"))
    if not found:
        raise DataError("no W&B files", str(run_dir / "wandb"), "tracking.trackers needs wandb, not disabled")
    for path in found:
        # W&B's only public reader of its files.
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            reason = done.stderr.strip().rpartition("\n")[2] or f"exit code {done.returncode}"
            raise DataError(
                f"W&B cannot read it: {reason}", str(path), "move it elsewhere; the page then lacks what it holds"
            )
        for record in map(json.loads, done.stdout.splitlines()):
            if record["type"] == "history":
                item = record["history"]["item"]
                for key in [key for key in item if key.endswith(".path")]:
                    item[key.removesuffix(".path")] = json.loads((path.parent / "files" / item[key]).read_bytes())
                yield item


def _panel(panel: Any, history: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The panel, as the page reads it."""
    made: dict[str, Any] = {"title": type(panel).__name__, "text": "", "unit": "", "lines": {}, "rows": []}
    made |= {"kind": "line", "scale": "linear", "ordered": False}
    if isinstance(panel, reports.LinePlot):
        series = {name: _points(history, panel.x, name) for name in panel.y}
        series = {name: points for name, points in series.items() if points}
        made |= {"title": panel.title, "text": f"x: {panel.x}", "unit": panel.title_y or "", "series": series}
        made["lines"] = {name: name for name in series}
    elif isinstance(panel, reports.MarkdownPanel):
        made["rows"] = [[line] for line in panel.markdown.splitlines()]
    elif isinstance(panel, reports.WeavePanelSummaryTable):
        tables = [row[panel.table_name] for row in history if panel.table_name in row]
        rows = [row for table in tables for row in table["data"]][-MAX_ROWS:]
        made |= {"title": panel.table_name, "rows": [tables[-1]["columns"], *rows] if rows else []}
    elif isinstance(panel, reports.RunComparer):
        made["rows"] = [["the configs of the runs, side by side"]]
    return made


def _points(history: Sequence[Mapping[str, Any]], x: Any, y: Any) -> dict[int, float]:
    """What W&B has of a curve: the calls that logged both."""
    return {row[x]: float(row[y]) for row in history if {x, y} <= row.keys()}

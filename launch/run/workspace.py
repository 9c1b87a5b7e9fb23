"""The W&B workspace of a project: a panel for each metric, by section of the one table of metrics."""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import wandb
import wandb_workspaces.reports.v2 as reports
import wandb_workspaces.workspaces as workspaces

from launch.run.metric_table import OTHER, SECTIONS, describe, rows, section_of
from qarl.errors import ResourceError

COMPARED = ("reward/mean", "eval/pass@1", "mismatch/logp_abs_max", "actor/clip_fraction", "perf/tokens_per_s")
"""What the comparison of runs, the first section, shows."""
TABLES = ("samples", "error_tokens")
NUMBERED = re.compile(r"(/q|hist_|level_)\d+")
"""Metrics that differ in this number alone share a panel."""


def make_workspace(entity: str, project: str, names: Iterable[str]) -> Any:
    """A workspace for runs that log the metrics `names`. It is not saved yet."""
    found = sorted(set(names))
    sections = [_section("compare runs", [name for name in COMPARED if name in found], [reports.RunComparer()])]
    for title in (*SECTIONS, OTHER):
        of_section = [name for name in found if section_of(name) == title]
        if of_section:
            sections.append(_section(title, of_section, [_meanings(title)] if title in SECTIONS else []))
    tables: list[Any] = [reports.WeavePanelSummaryTable(table_name=name) for name in TABLES]
    sections.append(workspaces.Section(name="samples", panels=tables, is_open=True))
    return workspaces.Workspace(entity=entity, project=project, name="qarl", sections=sections)


def save(workspace: Any) -> str:
    """Save the workspace to W&B; returns its address. Raises ResourceError: W&B refuses, or cannot be reached."""
    try:
        workspace.save()
    except (wandb.Error, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ResourceError(f"W&B did not save the workspace: {reason}", hint="run `wandb login`") from error
    return str(workspace.url)


def _section(title: str, names: Iterable[str], more: Sequence[Any]) -> Any:
    plots: dict[str, list[str]] = defaultdict(list)
    for name in names:
        plots[NUMBERED.sub(r"\1*", name)].append(name)
    panels = [*(_plot(*plot) for plot in plots.items()), *more]
    return workspaces.Section(name=title, panels=panels, is_open=title in ("compare runs", "reward", "eval"))


def _plot(title: str, names: list[Any]) -> Any:
    row = describe(names[0])
    return reports.LinePlot(title=title, x="step", y=names, title_y=row.unit if row and row.unit else None)


def _meanings(section: str) -> Any:
    """What each metric of the section means, as a panel."""
    lines = [f"- `{row.name}` [{row.unit or '1'}]: {row.text}" for row in rows() if row.section == section]
    return reports.MarkdownPanel(markdown="\n".join(lines))

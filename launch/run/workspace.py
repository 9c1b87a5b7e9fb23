"""The W&B workspace of a project: panels for all metrics, by section and in the order of the one table of metrics."""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import wandb
import wandb_workspaces.reports.v2 as reports
import wandb_workspaces.workspaces as workspaces
from wandb.sdk.lib.service.service_connection import WandbApiFailedError  # no public name, and no wandb.Error

from launch.run.metric_table import OTHER, SECTIONS, describe, position, section_of
from qarl.errors import ResourceError

COMPARED = ("reward/mean", "eval/pass@1", "mismatch/logp_abs_max", "actor/clip_fraction", "perf/tokens_per_s")
"""What the comparison of runs, the first section, shows."""
JOINED = (
    (r"^(mismatch|response_length)/(q\d_|unaligned_|probe_|kept_|dropped_)?", r"\1/*"),
    (r"^reward/\w+/", "reward/*/"),
    (r"^error_tokens/(repeated|compressible|improbable|share)$", "error_tokens by detector"),
    (r"^error_tokens/(positive|zero|negative)$", "error_tokens by advantage"),
    (r"^(timing_s|memory|augment)/.*", r"\1/*"),
    (r"^actor/(clip_fraction|grad_norm).*", r"actor/\1*"),
    (r"^pool/(cold|low|high|in_flight|cooling|retired)$", "pool by state"),
    (r"^pool/(archived|evicted|refused|reinserted|unknown_results)$", "pool, rare events"),
    (r"(/q|hist_|level_)\d+", r"\1*"),
)
"""Metrics for which the first pattern that matches gives the same title share a panel."""


def make_workspace(entity: str, project: str, names: Iterable[str], tables: Iterable[str]) -> Any:
    """A workspace for runs that log the metrics `names` and the tables. It is not saved yet."""
    found = sorted(set(names), key=lambda name: (position(name), name))
    sections = [_section("compare runs", [name for name in COMPARED if name in found], [reports.RunComparer()])]
    for title in (*SECTIONS, OTHER):
        of_section = [name for name in found if section_of(name) == title]
        if of_section:
            sections.append(_section(title, of_section, [_meanings(of_section)] if title in SECTIONS else []))
    shown = [reports.WeavePanelSummaryTable(table_name=name) for name in sorted(set(tables), reverse=True)]
    sections.append(_section("samples", [], shown, columns=1))
    return workspaces.Workspace(entity=entity, project=project, name="qarl", sections=sections)


def save(workspace: Any) -> str:
    """Save the workspace to W&B; returns its address. Raises ResourceError: W&B refuses, or cannot be reached."""
    try:
        workspace.save()
    except (wandb.Error, WandbApiFailedError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        hint = "check --entity, or run `wandb login`"
        raise ResourceError(f"W&B did not save the workspace: {reason}", hint=hint) from error
    return str(workspace.url)


def _section(title: str, names: Iterable[str], more: Sequence[Any], columns: int = 3) -> Any:
    """A section that shows all of its panels at once."""
    plots: dict[str, list[str]] = defaultdict(list)
    for name in names:
        plots[_joined(name)].append(name)
    panels = [*(_plot(*plot) for plot in plots.items()), *more]
    layout = workspaces.SectionLayoutSettings(columns=columns, rows=math.ceil(len(panels) / columns))
    is_open = title in ("compare runs", "reward", "eval", "samples")
    return workspaces.Section(name=title, panels=panels, is_open=is_open, layout_settings=layout)


def _joined(name: str) -> str:
    """The title of the panel that shows the metric."""
    for pattern, title in JOINED:
        if re.search(pattern, name):
            return re.sub(pattern, title, name)
    return name


def _plot(title: str, names: list[Any]) -> Any:
    row = describe(names[0])
    title = title if len(names) > 1 else names[0]
    return reports.LinePlot(
        title=title, x="step", y=names, title_x="step", title_y=row.unit if row and row.unit else None
    )


def _meanings(names: Iterable[str]) -> Any:
    """What the metrics mean, as a panel."""
    found = dict.fromkeys(row for name in names if (row := describe(name)))
    lines = [f"- `{row.name}`{f' [{row.unit}]' if row.unit else ''}: {row.text}" for row in found]
    return reports.MarkdownPanel(markdown="\n".join(lines))

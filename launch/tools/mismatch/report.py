"""What `qarl mismatch` found: tables for the terminal and for Markdown, mismatch.json, mismatch.png."""

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table

from launch.run.gaps import GAPS_FILE, Cell, Gap, Part, write_gaps

PLOT_FILE = "mismatch.png"
WIDTH = 400
"""Columns of the console: a wrapped line would be no Markdown."""

COLORS: dict[Part, str] = {
    "learner": "#0072b2",
    "engine": "#9a9a9a",
    "format": "#d55e00",
    "rounding": "#009e73",
    "staleness": "#cc79a7",
}


def write_report(out: Path, cells: Sequence[Cell]) -> None:
    """Write mismatch.json and mismatch.png into the folder `out`, made when it is not there."""
    out.mkdir(parents=True, exist_ok=True)
    write_gaps(out / GAPS_FILE, cells)
    draw(cells).savefig(out / PLOT_FILE, dpi=110)


def render(cells: Sequence[Cell]) -> RenderableType:
    """Two tables, which are Markdown as they stand."""
    return Group(_profiles(cells), "", _sources(cells))


def _profiles(cells: Sequence[Cell]) -> Table:
    """One line for each cell: mean |d log p| (k3 KL) of each learner against the sampler."""
    names = _names(cells, ("learner",))
    table = Table("scheme", "dtype", "tokens", *(name for _, name in names), box=box.MARKDOWN)
    for cell in cells:
        found = {(gap.part, gap.name): gap for gap in cell.gaps}
        shown = [_with_k3(found[key]) if key in found else "-" for key in names]
        table.add_row(cell.scheme, cell.dtype, str(cell.length), *shown)
    return table


def _sources(cells: Sequence[Cell]) -> Table:
    """One line for each source, one column for each cell: mean |d log p|."""
    table = Table("part", "what differs", *(cell.title for cell in cells), box=box.MARKDOWN)
    for part, name in _names(cells, ("engine", "format", "rounding", "staleness")):
        found = [next((gap.mean for gap in cell.gaps if (gap.part, gap.name) == (part, name)), None) for cell in cells]
        table.add_row(part, name, *("-" if value is None else _number(value) for value in found))
    return table


def _names(cells: Sequence[Cell], parts: Sequence[Part]) -> list[tuple[Part, str]]:
    """(part, name) of every gap of these parts, in order, once."""
    return list(
        dict.fromkeys((gap.part, gap.name) for part in parts for c in cells for gap in c.gaps if gap.part == part)
    )


def _with_k3(gap: Gap) -> str:
    return _number(gap.mean) + (f" ({_number(gap.metrics['k3_kl'])})" if gap.mean else "")


def _number(value: float) -> str:
    return "exactly 0" if value == 0 else f"{value:.1e}"


def draw(cells: Sequence[Cell]) -> Figure:
    """One row for each cell: mean and max of every gap on the left, growth over the response on the right."""
    figure = Figure(figsize=(15, 4.6 * len(cells)), layout="constrained")
    axes = figure.subplots(len(cells), 2, squeeze=False, width_ratios=(3, 2))
    shown = [value for cell in cells for gap in cell.gaps for value in (gap.mean, gap.max) if 0 < value < math.inf]
    limits = 10.0 ** (math.floor(math.log10(min(shown, default=1e-6))) - 1), 2 * max(shown, default=1.0)
    for cell, (left, right) in zip(cells, axes, strict=True):
        _draw_sources(left, cell, limits)
        _draw_growth(right, cell)
    return figure


def _draw_sources(ax: Axes, cell: Cell, limits: tuple[float, float]) -> None:
    """Logarithmic; zeros, which a log axis lacks, are drawn at its left end, infinity at its right."""
    floor, top = limits
    for row, gap in enumerate(cell.gaps):
        mean, largest = (min(max(value, floor), top) for value in (gap.mean, gap.max))
        ax.barh(row, mean - floor, left=floor, color=COLORS[gap.part])
        ax.plot(largest, row, "|", color="black", markersize=9)
        ax.text(mean * 1.15, row, _number(gap.mean), va="center", fontsize=8)
    ax.set_yticks(range(len(cell.gaps)), [gap.name for gap in cell.gaps])
    ax.invert_yaxis()
    ax.set(xscale="log", xlim=limits, xlabel="|d log p|, nats: mean (bar) and max (mark)")
    ax.set_title(f"{cell.title} tokens", loc="left", fontweight="bold")


def _draw_growth(ax: Axes, cell: Cell) -> None:
    for gap in cell.gaps:
        if gap.part == "learner" and 0 < gap.mean < math.inf:
            quarters = [gap.metrics.get(f"q{number}_logp_abs_mean", math.nan) for number in (1, 2, 3, 4)]
            ax.plot((1, 2, 3, 4), quarters, marker="o", label=gap.name)
    ax.set(xticks=(1, 2, 3, 4), xlabel="quarter of the response", ylabel="mean |d log p|, nats")
    ax.set_title("learner against sampler", loc="left")
    if ax.has_data():
        ax.set_yscale("log")
        ax.legend(frameon=False)

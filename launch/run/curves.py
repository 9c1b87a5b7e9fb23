"""The picture of a run: eight panels over training steps."""

import io
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import cycle, pairwise
from statistics import fmean

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from launch.run.metric_table import overall_figures
from qarl.prompts.augment import REASONS
from qarl.prompts.stats import BINS

Series = dict[str, dict[int, float]]
"""Metric name -> step -> value."""
Points = Mapping[int, float]
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000", "#9a9a9a")
STYLES = ("-", "--", ":", "-.")
MISMATCH = {"unaligned, max": "unaligned_logp_abs_max", "unaligned, mean": "unaligned_logp_abs_mean"}
MISMATCH |= {"aligned, max": "logp_abs_max", "aligned, mean": "logp_abs_mean"}
LARGEST = 1e30
"""Larger values, and infinite ones, are left out: matplotlib cannot draw an axis for them."""
SMALLEST_MISMATCH = 1e-6
"""In nats; the axis is linear below it, so that zeros show."""


def draw_curves(series: Series, title: str, controls: Mapping[str, float]) -> bytes:
    """The picture as PNG bytes; `controls` are levels of held-out accuracy, by name."""
    series = {name: {s: v if abs(v) < LARGEST else np.nan for s, v in of.items()} for name, of in series.items()}
    figure = new_figure(16.5)
    figure.suptitle(title, fontsize=16, fontweight="bold")
    panels: dict[str, Callable[[Axes, Series], None]] = {
        "Reward": _draw_reward,
        "Held-out accuracy": partial(_draw_accuracy, controls),
        "Learner against sampler, |d log p|": _draw_mismatch,
        "Where a step's time goes": _draw_times,
        "Share clipped": _draw_clipping,
        "Prompt pool": draw_pool,
        "Prompt pool, success rates": _draw_histogram,
        "Problems made by the policy": _draw_augmentation,
    }
    for ax, (name, draw) in zip(figure.subplots(4, 2).flat, panels.items(), strict=True):
        prepare(ax, name)
        draw(ax, series)
        if not ax.has_data():
            ax.text(0.5, 0.5, "not measured in this run", ha="center", color=PALETTE[-1], transform=ax.transAxes)
            ax.set(xticks=[], yticks=[])
        elif ax.get_legend_handles_labels()[0]:
            reverse = bool(ax.collections)  # the legend of a stack reads from the top
            ax.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1.0, 1.0), reverse=reverse)
    return png(figure, dpi=110)


def new_figure(height: float) -> Figure:
    return Figure(figsize=(15, height), layout=ConstrainedLayoutEngine(hspace=0.06, wspace=0.04))


def prepare(ax: Axes, title: str) -> None:
    """Title, grid and axis of a panel over steps."""
    ax.set_title(title, loc="left", fontsize=12, fontweight="bold")
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    ax.set_axisbelow(True)
    ax.set_xlabel("step")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))


def png(figure: Figure, dpi: int) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=dpi)
    return file.getvalue()


def _lines(ax: Axes, lines: Mapping[str, Points], marker: str = "") -> None:
    looks = ((color, style) for style in STYLES for color in PALETTE)
    for (color, style), (label, points) in zip(looks, lines.items(), strict=False):
        ax.plot(list(points), list(points.values()), style, color=color, label=label, marker=marker, markersize=4)


def _stack(ax: Axes, steps: Sequence[int], parts: Mapping[str, Sequence[float]]) -> None:
    """Areas on top of one another; a step is drawn as wide as it is, so that a run of one step shows too."""
    edges = [edge for step in steps for edge in (step - 0.5, step + 0.5)]
    heights = [[value for value in part for _ in range(2)] for part in parts.values()]
    ax.stackplot(edges, heights, labels=list(parts), colors=PALETTE, linewidth=0, alpha=0.85)


def _draw_reward(ax: Axes, series: Series) -> None:
    if points := series.get("reward/mean"):
        values, window = list(points.values()), max(1, len(points) // 10)
        means = [fmean(values[max(0, end - window) : end]) for end in range(1, len(values) + 1)]
        _lines(ax, {f"mean of {window} steps": dict(zip(points, means, strict=True))})
        ax.plot(list(points), values, color=PALETTE[4], linewidth=1, alpha=0.8, label="mean of a step")
        ax.set_ylim(0, 1.03)


def _draw_accuracy(controls: Mapping[str, float], ax: Axes, series: Series) -> None:
    overall = {name.removeprefix("eval/"): series[name] for name in overall_figures(series)}
    _lines(ax, overall, marker="o")
    if overall:
        for style, (name, value) in zip(cycle(STYLES[1:]), controls.items(), strict=False):
            ax.axhline(value, color="#444444", linestyle=style, linewidth=1.2, label=f"{name}\n(control)")
        ax.set_ylim(0, 1.03)


def _draw_mismatch(ax: Axes, series: Series) -> None:
    lines = {label: series[f"mismatch/{name}"] for label, name in MISMATCH.items() if f"mismatch/{name}" in series}
    if lines:
        _lines(
            ax, {label if any(points.values()) else f"{label}\n(exactly 0)": points for label, points in lines.items()}
        )
        ax.set_yscale("symlog", linthresh=SMALLEST_MISMATCH)
        ax.set_ylim(bottom=-SMALLEST_MISMATCH / 2)
        ax.set_ylabel("nats")


def _draw_times(ax: Axes, series: Series) -> None:
    if total := series.get("timing_s/step"):
        names = ("pool", "sample", "reward", "prox", "update", "publish")
        parts = {name: [series.get(f"timing_s/{name}", {}).get(s, 0.0) for s in total] for name in names}
        parts["other"] = [
            max(0.0, all_ - sum(named)) for all_, *named in zip(total.values(), *parts.values(), strict=True)
        ]
        _stack(ax, list(total), parts)
        ax.set_ylabel("seconds")


def _draw_clipping(ax: Axes, series: Series) -> None:
    _lines(ax, {n.removeprefix("actor/"): v for n, v in series.items() if n.startswith("actor/") and "clip" in n})


def draw_pool(ax: Axes, series: Series) -> None:
    """Counts only: shares and rates, at most 1, would lie on the axis."""
    counts = {n.removeprefix("pool/"): v for n, v in series.items() if n.startswith("pool/") and max(v.values()) > 1}
    _lines(ax, counts)
    ax.set_ylabel("prompts")


def _draw_histogram(ax: Axes, series: Series) -> None:
    """Share of the seen prompts by success rate, over steps: a column for each step, dark where many are."""
    bins = [series.get(f"pool/success_hist_{k}", {}) for k in range(BINS)]
    if not all(bins):
        return
    steps = sorted(bins[0])
    shares = np.array([[points.get(step, np.nan) for step in steps] for points in bins])
    # Each step's column reaches half-way to its neighbours.
    edges = [steps[0] - 0.5, *((a + b) / 2 for a, b in pairwise(steps)), steps[-1] + 0.5]
    mesh = ax.pcolormesh(edges, np.linspace(0.0, 1.0, BINS + 1), shares, cmap="Blues", vmin=0.0)
    ax.figure.colorbar(mesh, cax=ax.inset_axes((1.03, 0.0, 0.03, 1.0)), label="share of seen prompts")
    ax.set_ylabel("success rate")
    ax.grid(False)


def _draw_augmentation(ax: Axes, series: Series) -> None:
    """Problems that the policy made: accepted, and refused by reason, since the start of the run."""
    counts = {name: series.get(f"augment/{name}", {}) for name in ("accepted", *(f"rejected_{r}" for r in REASONS))}
    counts = {name.removeprefix("rejected_"): points for name, points in counts.items() if any(points.values())}
    if counts:
        steps = sorted(set().union(*counts.values()))
        _stack(ax, steps, {name: [points.get(s, 0.0) for s in steps] for name, points in counts.items()})
        ax.set_ylabel("problems")

"""The prompt pool's panels in the picture of a run."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import numpy as np
from matplotlib.axes import Axes

from qarl.prompts.augment import REASONS
from qarl.prompts.stats import BINS

Points = Mapping[int, float]
COLORS = ("#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#e69f00", "#9a9a9a", "#0072b2", "#000000")


def draw_histogram(ax: Axes, series: Mapping[str, Points]) -> None:
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


def draw_augmentation(ax: Axes, series: Mapping[str, Points]) -> None:
    """Problems that the policy made: accepted, and refused by reason, since the start of the run."""
    drawn = {"accepted": series.get("augment/accepted", {})}
    drawn |= {reason: series.get(f"augment/rejected_{reason}", {}) for reason in REASONS}
    drawn = {name: points for name, points in drawn.items() if any(points.values())}
    if drawn:
        steps = list(next(iter(drawn.values())))
        heights = [[points.get(step, 0.0) for step in steps] for points in drawn.values()]
        ax.stackplot(steps, heights, labels=list(drawn), colors=COLORS[: len(drawn)], linewidth=0, alpha=0.85)
        ax.set_ylabel("problems")

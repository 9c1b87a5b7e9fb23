"""Metrics that carry their own reduction, so that ranks and micro-batches can be merged without guessing by name."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Metric:
    """A partial value: `mean` keeps (weighted sum, weight), `sum` and `max` keep the value, `ess` keeps the sum and the
    sum of squares of `weight` numbers."""

    value: float
    weight: float = 1.0
    reduction: Literal["mean", "sum", "max", "ess"] = "mean"
    squares: float = 0.0


@dataclass(frozen=True)
class Histogram:
    """`counts[i]` values between `edges[i]` and `edges[i + 1]`; the outermost bins also hold what lies beyond."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]


Metrics = dict[str, Metric | Histogram]
Value = float | Histogram
"""What a metric is once it is reduced."""


def mean(total: float, weight: float) -> Metric:
    """A weighted mean given by its sum and weight."""
    return Metric(total, weight, "mean")


def maximum(value: float) -> Metric:
    return Metric(value, 1.0, "max")


def effective_sample_size(total: float, squares: float, count: float) -> Metric:
    """Of `count` importance weights, `(sum w)^2 / (count * sum w^2)`: 1 when all are equal, 1/count when one counts."""
    return Metric(total, count, "ess", squares)


def merge(parts: Iterable[Mapping[str, Metric | Histogram]]) -> dict[str, Value]:
    """Reduce partial metrics of ranks, micro-batches or minibatches to plain numbers and whole histograms.

    A mean of no weight, and the sample size of weights that are all 0, are left out. Raises ValueError when one name
    comes with two reductions, or two sets of edges.
    """
    grouped: dict[str, list[Metric | Histogram]] = {}
    for part in parts:
        for name, metric in part.items():
            grouped.setdefault(name, []).append(metric)
    reduced: dict[str, Value] = {}
    for name, group in grouped.items():
        if len({metric.reduction if isinstance(metric, Metric) else metric.edges for metric in group}) > 1:
            raise ValueError(f"metric {name} has two reductions")
        value = _reduce(group)
        if value is not None:
            reduced[name] = value
    return reduced


def _reduce(group: list[Metric | Histogram]) -> Value | None:
    histograms = [metric for metric in group if isinstance(metric, Histogram)]
    if histograms:
        columns = zip(*(histogram.counts for histogram in histograms), strict=True)
        return Histogram(histograms[0].edges, tuple(map(sum, columns)))
    metrics = [metric for metric in group if isinstance(metric, Metric)]
    weight = sum(metric.weight for metric in metrics)
    total = sum(metric.value for metric in metrics)
    match metrics[0].reduction:
        case "mean":
            return total / weight if weight > 0 else None
        case "sum":
            return total
        case "max":
            return max(metric.value for metric in metrics)
        case "ess":
            squares = sum(metric.squares for metric in metrics)
            return total**2 / (weight * squares) if squares > 0 else None

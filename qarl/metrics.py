"""Metrics that carry their own reduction, so that ranks and micro-batches can be merged without guessing by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Metric:
    """A partial value: `mean` keeps (weighted sum, weight), `sum` and `max` keep the value."""

    value: float
    weight: float = 1.0
    reduction: Literal["mean", "sum", "max"] = "mean"


Metrics = dict[str, Metric]


def mean(total: float, weight: float) -> Metric:
    """A weighted mean given by its sum and weight."""
    return Metric(total, weight, "mean")


def maximum(value: float) -> Metric:
    return Metric(value, 1.0, "max")


def merge(parts: Iterable[Mapping[str, Metric]]) -> dict[str, float]:
    """Reduce partial metrics of ranks, micro-batches or minibatches to plain numbers.

    A mean of no weight is left out. Raises ValueError when one name comes with two reductions.
    """
    grouped: dict[str, list[Metric]] = {}
    for part in parts:
        for name, metric in part.items():
            grouped.setdefault(name, []).append(metric)
    reduced: dict[str, float] = {}
    for name, group in grouped.items():
        if len({metric.reduction for metric in group}) > 1:
            raise ValueError(f"metric {name} has two reductions")
        match group[0].reduction:
            case "mean":
                weight = sum(metric.weight for metric in group)
                if weight > 0:
                    reduced[name] = sum(metric.value for metric in group) / weight
            case "sum":
                reduced[name] = sum(metric.value for metric in group)
            case "max":
                reduced[name] = max(metric.value for metric in group)
    return reduced

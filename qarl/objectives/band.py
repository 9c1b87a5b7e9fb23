"""The one-sided bounds that PPO's minimum and the dual clip come down to. Suffixes: B sequences, T response tokens.

For A >= 0, `min(r A, clip(r, 1-low, 1+high) A)` is `min(r, 1+high) A`: only the upper bound binds. For A < 0 it is
`max(r, 1-low) A`, and a dual clip adds an upper bound. So each sequence has one interval for its ratio, and outside of
it no gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from qarl.metrics import Metrics, mean
from qarl.objectives.aggregate import drop_metrics


@dataclass(frozen=True)
class Band:
    """Bounds on a ratio: `pos_high` (one for all, or [B, T]) above for A >= 0, `neg_low` below and `neg_high` above for
    A < 0."""

    pos_high: float | Tensor
    neg_low: float
    neg_high: float = inf

    def clamp(self, ratio: Tensor, advantage_B: Tensor) -> Tensor:
        """`ratio` [B] or [B, T] within the interval of its sequence."""
        low, high = self._bounds(ratio, advantage_B)
        return ratio.clamp(low, high)

    def clip_metrics(self, ratio: Tensor, advantage_B: Tensor, lengths_B: Tensor) -> Metrics:
        """Clipped shares, of sequences or of tokens as `ratio` is [B] or [B, T] (then 1 where masked).

        A clip is counted where the chosen branch is the clipped one: never for A = 0, never in the other direction.
        """
        return _clip_metrics(*self._outside(ratio, advantage_B), advantage_B, lengths_B)

    def metrics(self, ratio: Tensor, weight: Tensor | None, advantage_B: Tensor, lengths_B: Tensor) -> Metrics:
        """`clip_metrics`, and what is dropped where a clip or a `weight` of 0 leaves no gradient."""
        above, below = self._outside(ratio, advantage_B)
        dropped = drop_metrics(above | below, weight, advantage_B, lengths_B)
        return _clip_metrics(above, below, advantage_B, lengths_B) | dropped

    def _outside(self, ratio: Tensor, advantage_B: Tensor) -> tuple[Tensor, Tensor]:
        low, high = self._bounds(ratio, advantage_B)
        return ratio > high, ratio < low

    def _bounds(self, ratio: Tensor, advantage_B: Tensor) -> tuple[Tensor, Tensor]:
        negative_B = (advantage_B < 0).reshape(-1, *[1] * (ratio.dim() - 1))

        def choose(negative: float, positive: float | Tensor) -> Tensor:
            high = positive if isinstance(positive, Tensor) else ratio.new_tensor(positive)
            return torch.where(negative_B, ratio.new_tensor(negative), high)

        return choose(self.neg_low, -inf), choose(self.neg_high, self.pos_high)


def _clip_metrics(above: Tensor, below: Tensor, advantage_B: Tensor, lengths_B: Tensor) -> Metrics:
    above_B, below_B, size_B = above, below, torch.ones_like(lengths_B)
    if above.dim() == 2:
        above_B, below_B, size_B = above.sum(1), below.sum(1), lengths_B
    negative_B = advantage_B < 0
    pos_high = int(above_B[advantage_B > 0].sum())
    neg_low, neg_high = int(below_B[negative_B].sum()), int(above_B[negative_B].sum())
    count, negatives = int(size_B.sum()), int(size_B[negative_B].sum())
    return {
        "actor/clip_fraction": mean(pos_high + neg_low + neg_high, count),
        "actor/clip_fraction_pos_high": mean(pos_high, count - negatives),
        "actor/clip_fraction_neg_low": mean(neg_low, negatives),
        "actor/clip_fraction_neg_high": mean(neg_high, negatives),
    }

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
    """Ratios [B] or [B, T] within their intervals, `low` to `high`: [B]; [B, 1] or [B, T]."""

    ratio: Tensor
    low: Tensor
    high: Tensor
    above: Tensor
    below: Tensor
    """bool as `ratio`: beyond the bound, where there is no gradient."""
    advantage_B: Tensor

    @classmethod
    def of(
        cls, ratio: Tensor, advantage_B: Tensor, pos_high: float | Tensor, neg_low: float, neg_high: float = inf
    ) -> Band:
        """Bounds for `ratio` [B] or [B, T] (then 1 for padding): `pos_high` (one for all, or [B, T]) above for A >= 0,
        `neg_low` below and `neg_high` above for A < 0."""
        negative_B = (advantage_B < 0).reshape(-1, *[1] * (ratio.dim() - 1))
        pos_high = pos_high if isinstance(pos_high, Tensor) else ratio.new_tensor(pos_high)
        low = torch.where(negative_B, ratio.new_tensor(neg_low), ratio.new_tensor(-inf))
        high = torch.where(negative_B, ratio.new_tensor(neg_high), pos_high)
        fixed = ratio.detach()
        return cls(ratio, low, high, fixed > high, fixed < low, advantage_B)

    def clamped(self) -> Tensor:
        """The ratios within their intervals: `ratio.clamp(low, high)`, whose own gradient costs twice as much."""
        return torch.where(self.above | self.below, self.ratio.detach().clamp(self.low, self.high), self.ratio)

    def metrics(self, masked: Tensor | None, lengths_B: Tensor) -> Metrics:
        """`clip_metrics`, and what is dropped: clipped, or `masked` by the correction."""
        dropped = drop_metrics(self.above | self.below, masked, self.advantage_B, lengths_B)
        return self.clip_metrics(masked, lengths_B) | dropped

    def clip_metrics(self, masked: Tensor | None, lengths_B: Tensor) -> Metrics:
        """Clipped shares, of sequences or of tokens as the ratios are.

        A clip is counted where the chosen branch is the clipped one: never for A = 0, never in the other direction,
        never where the correction `masked` ([B], or as the ratios) what would be clipped.
        """
        above_B, below_B, size_B = self.above, self.below, torch.ones_like(lengths_B)
        if masked is not None:
            kept = ~masked if masked.dim() == above_B.dim() else ~masked[:, None]
            above_B, below_B = above_B & kept, below_B & kept
        if self.above.dim() == 2:
            above_B, below_B, size_B = above_B.sum(1), below_B.sum(1), lengths_B
        negative_B = self.advantage_B < 0
        pos_high = int(above_B[self.advantage_B > 0].sum())
        neg_low, neg_high = int(below_B[negative_B].sum()), int(above_B[negative_B].sum())
        count, negatives = int(size_B.sum()), int(size_B[negative_B].sum())
        return {
            "actor/clip_fraction": mean(pos_high + neg_low + neg_high, count),
            "actor/clip_fraction_pos_high": mean(pos_high, count - negatives),
            "actor/clip_fraction_neg_low": mean(neg_low, negatives),
            "actor/clip_fraction_neg_high": mean(neg_high, negatives),
        }

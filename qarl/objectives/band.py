"""The one-sided bounds that PPO's minimum and the dual clip reduce to.

Suffix K: one column for each ratio of a sequence, T for token ratios, 1 for the sequence ratio.

For A >= 0, `min(r A, clip(r, 1-low, 1+high) A)` is `min(r, 1+high) A`: only the upper bound binds. For A < 0 it is
`max(r, 1-low) A`, and a dual clip adds an upper bound. So each sequence has one interval for its ratios, and outside
that interval there is no gradient.
"""

from dataclasses import dataclass
from math import inf
from typing import Self

import torch
from torch import Tensor

from qarl.metrics import Metrics, mean


@dataclass(frozen=True)
class Band:
    """Ratios and the interval of each, `low` to `high` (broadcast to [B, K])."""

    ratio_BK: Tensor
    mask_BK: Tensor
    """bool, False at padding."""
    low: Tensor
    high: Tensor
    above_BK: Tensor
    below_BK: Tensor
    """bool: beyond the bound, where there is no gradient. Means nothing at padding."""
    advantage_B: Tensor

    @classmethod
    def of(
        cls,
        ratio_BK: Tensor,
        mask_BK: Tensor,
        advantage_B: Tensor,
        pos_high: float | Tensor,
        neg_low: float,
        neg_high: float = inf,
    ) -> Self:
        """The upper bound is `pos_high` (one for all, or [B, K]) for A >= 0; for A < 0 the bounds are `neg_low` and
        `neg_high`."""
        negative_B1 = (advantage_B < 0)[:, None]
        pos_high = pos_high if isinstance(pos_high, Tensor) else ratio_BK.new_tensor(pos_high)
        low = torch.where(negative_B1, ratio_BK.new_tensor(neg_low), ratio_BK.new_tensor(-inf))
        high = torch.where(negative_B1, ratio_BK.new_tensor(neg_high), pos_high)
        fixed_BK = ratio_BK.detach()
        return cls(ratio_BK, mask_BK, low, high, fixed_BK > high, fixed_BK < low, advantage_B)

    @property
    def outside_BK(self) -> Tensor:
        """bool: beyond either bound."""
        return self.above_BK | self.below_BK

    def clamped(self) -> Tensor:
        """The ratios clamped to their intervals: [B, K]. The gradient of `ratio.clamp(low, high)` costs twice as
        much."""
        return torch.where(self.outside_BK, self.ratio_BK.detach().clamp(self.low, self.high), self.ratio_BK)

    def clip_metrics(self, masked_BK: Tensor) -> Metrics:
        """Clipped fractions, of sequences or of tokens as the ratios are.

        A clip counts where the clipped branch is the one that was chosen: never for A = 0, never beyond a bound that
        does not bind for the sign of A, never where the correction's mask (`masked_BK`) sets the term to 0.
        """
        kept_BK = self.mask_BK & ~masked_BK
        above_B, below_B = (self.above_BK & kept_BK).sum(1), (self.below_BK & kept_BK).sum(1)
        size_B, negative_B = self.mask_BK.sum(1), self.advantage_B < 0
        pos_high = int(above_B[self.advantage_B > 0].sum())
        neg_low, neg_high = int(below_B[negative_B].sum()), int(above_B[negative_B].sum())
        count, negatives = int(size_B.sum()), int(size_B[negative_B].sum())
        return {
            "actor/clip_fraction": mean(pos_high + neg_low + neg_high, count),
            "actor/clip_fraction_pos_high": mean(pos_high, count - negatives),
            "actor/clip_fraction_neg_low": mean(neg_low, negatives),
            "actor/clip_fraction_neg_high": mean(neg_high, negatives),
        }

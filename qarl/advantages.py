"""From rewards to advantages. Suffixes: G responses to one prompt."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean, pstdev

from qarl.errors import DataError

EPSILON = 1e-6


def group_advantages(rewards_G: Sequence[float], normalize_by_std: bool) -> list[float]:
    """GRPO's group-relative advantages (arXiv 2402.03300): `(R - mean) / (std + 1e-6)`, or `R - mean`.

    The standard deviation is the population's. A group of equal rewards has advantages of zero.
    Raises DataError for fewer than two rewards.
    """
    if len(rewards_G) < 2:
        raise DataError(f"a group of {len(rewards_G)} has no baseline", mend="use train.group_size >= 2")
    centre = mean(rewards_G)  # exact, unlike fmean: equal rewards must not leave a rounding error over 1e-6
    scale = pstdev(rewards_G) + EPSILON if normalize_by_std else 1.0
    return [(reward - centre) / scale for reward in rewards_G]


def has_variance(rewards_G: Sequence[float]) -> bool:
    """Whether the group tells anything: its rewards are not all equal."""
    return any(reward != rewards_G[0] for reward in rewards_G)

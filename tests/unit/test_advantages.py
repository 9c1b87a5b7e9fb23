"""Group-relative advantages."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qarl.advantages import group_advantages, has_variance
from qarl.errors import DataError

REWARDS = st.floats(0, 1, allow_subnormal=False)
GROUPS = st.lists(REWARDS, min_size=2, max_size=16)


def test_by_hand() -> None:
    assert group_advantages([1.0, 0.0, 0.0, 1.0], normalize_by_std=False) == [0.5, -0.5, -0.5, 0.5]
    assert group_advantages([1.0, 0.0], normalize_by_std=True) == pytest.approx([1.0, -1.0], rel=1e-5)


@given(rewards=GROUPS, by_std=st.booleans())
@settings(deadline=None)
def test_is_the_definition(rewards: list[float], by_std: bool) -> None:
    values = np.array(rewards)
    expected = (values - values.mean()) / (values.std() + 1e-6 if by_std else 1.0)
    np.testing.assert_allclose(group_advantages(rewards, by_std), expected, rtol=1e-6, atol=1e-9)


@given(rewards=GROUPS, by_std=st.booleans())
@settings(deadline=None)
def test_sum_is_zero_and_order_is_kept(rewards: list[float], by_std: bool) -> None:
    advantages = group_advantages(rewards, by_std)
    assert sum(advantages) == pytest.approx(0.0, abs=1e-8)
    order = np.argsort(rewards, kind="stable")
    assert (np.diff(np.array(advantages)[order]) >= 0).all()


@given(reward=REWARDS, size=st.integers(2, 16), by_std=st.booleans())
@settings(deadline=None)
def test_equal_rewards_give_exactly_zero(reward: float, size: int, by_std: bool) -> None:
    assert group_advantages([reward] * size, by_std) == [0.0] * size


@given(rewards=GROUPS)
@settings(deadline=None)
def test_variance_is_any_difference(rewards: list[float]) -> None:
    assert has_variance(rewards) == (len(set(rewards)) > 1)


@pytest.mark.parametrize("rewards", [[], [1.0]])
def test_a_group_needs_two(rewards: list[float]) -> None:
    with pytest.raises(DataError, match=r"has no baseline; use train\.group_size >= 2"):
        group_advantages(rewards, normalize_by_std=True)

"""Group-relative advantages."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qarl.advantages import advantages, group_advantages, has_variance
from qarl.config.run import AdvantageConfig
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


# --- estimators over the groups of a step ----------------------------------------------------------------------------

STEPS = st.lists(GROUPS, min_size=1, max_size=5)


def test_estimators_by_hand() -> None:
    rewards = [[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]]

    def by(estimator: str, normalize_by_std: bool = False) -> list[list[float]]:
        config = AdvantageConfig(estimator=estimator, normalize_by_std=normalize_by_std)  # type: ignore[arg-type]
        return [pytest.approx(group) for group in advantages(rewards, config)]

    assert by("group") == [[2 / 3, -1 / 3, -1 / 3], [1 / 3, 1 / 3, -2 / 3]]
    assert by("leave_one_out") == [[1.0, -0.5, -0.5], [0.5, 0.5, -1.0]]
    assert by("batch") == [[0.5, -0.5, -0.5], [0.5, 0.5, -0.5]]
    assert by("group_batch") == [[2 / 3, -1 / 3, -1 / 3], [1 / 3, 1 / 3, -2 / 3]]
    assert advantages(rewards, AdvantageConfig(estimator="batch"))[0] == pytest.approx([1.0, -1.0, -1.0], rel=1e-5)


@given(rewards=STEPS, by_std=st.booleans())
@settings(deadline=None)
def test_leave_one_out_is_the_definition(rewards: list[list[float]], by_std: bool) -> None:
    found = advantages(rewards, AdvantageConfig(estimator="leave_one_out", normalize_by_std=by_std))
    for values, group in zip(found, rewards, strict=True):
        others = [np.mean(group[:i] + group[i + 1 :]) for i in range(len(group))]
        scale = np.std(group) + 1e-6 if by_std else 1.0
        np.testing.assert_allclose(values, (np.array(group) - others) / scale, rtol=1e-6, atol=1e-9)


@given(rewards=STEPS, by_std=st.booleans(), centred=st.booleans())
@settings(deadline=None)
def test_batch_normalised_is_the_definition(rewards: list[list[float]], by_std: bool, centred: bool) -> None:
    estimator = "group_batch" if centred else "batch"
    found = advantages(rewards, AdvantageConfig(estimator=estimator, normalize_by_std=by_std))  # type: ignore[arg-type]
    everything = np.concatenate([np.array(g) - np.mean(g) if centred else np.array(g) for g in rewards])
    expected = (everything - everything.mean()) / (everything.std() + 1e-6 if by_std else 1.0)
    np.testing.assert_allclose(np.concatenate(found), expected, rtol=1e-6, atol=1e-8)
    assert [len(values) for values in found] == [len(group) for group in rewards]


@given(rewards=STEPS, by_std=st.booleans())
@settings(deadline=None)
def test_the_default_is_the_group(rewards: list[list[float]], by_std: bool) -> None:
    config = AdvantageConfig(normalize_by_std=by_std)
    assert advantages(rewards, config) == [group_advantages(group, by_std) for group in rewards]


@pytest.mark.parametrize("estimator", ["group", "leave_one_out", "group_batch", "batch"])
def test_no_groups_and_too_small_groups(estimator: str) -> None:
    config = AdvantageConfig(estimator=estimator)  # type: ignore[arg-type]
    assert advantages([], config) == []
    with pytest.raises(DataError, match=r"^group 1: a group of 1 has no baseline"):
        advantages([[1.0, 0.0], [1.0]], config)
    with pytest.raises(DataError, match=r"^prompt b: a group of 1 has no baseline"):
        advantages([[1.0, 0.0], [1.0]], config, ["a", "b"])
    with pytest.raises(DataError, match=r"^1 prompts \['a'\] for 2 groups"):
        advantages([[1.0, 0.0], [1.0, 0.0]], config, ["a"])

"""Mismatch between learner and sampler, and the reduction of metrics."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from qarl.metrics import Metric, maximum, mean, merge
from qarl.mismatch import Mismatch

LOGPROBS = arrays(np.float32, st.integers(1, 8), elements=st.floats(-20, 0, width=32))


def split(values: list[float], *lengths: int) -> list[np.ndarray]:
    return np.split(np.array(values, dtype=np.float32), np.cumsum(lengths)[:-1])


def test_by_hand() -> None:
    learner = split([-1.0, -2.0, -3.0], 2, 1)
    sampler = split([-1.5, -2.0, -2.0], 2, 1)
    mismatch = Mismatch.between(learner, sampler)
    assert mismatch.abs_mean == pytest.approx(0.5)
    assert mismatch.abs_p99 == pytest.approx(0.99)  # linear between 0.5 and 1: 0.98 of the way
    assert mismatch.abs_max == 1.0
    assert mismatch.k1 == pytest.approx((1 - 0.5) / 3)
    assert mismatch.k3 == pytest.approx((math.exp(0.5) + math.exp(-1) + 1 - 3 + 0.5) / 3)


def test_tokens_count_alike_however_they_are_split() -> None:
    learner, sampler = [-1.0, -2.0, -3.0, -4.0], [-1.1, -2.5, -2.0, -4.0]
    whole = Mismatch.between(split(learner, 4), split(sampler, 4))
    assert Mismatch.between(split(learner, 1, 0, 3), split(sampler, 1, 0, 3)) == whole


@given(learner=LOGPROBS, seed=st.integers(0, 1000), size=st.sampled_from([1e-7, 1e-3, 1.0]))
@settings(deadline=None)
def test_bounds(learner: np.ndarray, seed: int, size: float) -> None:
    noise = np.random.default_rng(seed).normal(size=learner.shape) * size
    mismatch = Mismatch.between([learner], [(learner + noise).astype(np.float32)])
    assert 0 <= mismatch.abs_mean <= mismatch.abs_max * (1 + 1e-12)
    assert mismatch.abs_p99 <= mismatch.abs_max
    assert abs(mismatch.k1) <= mismatch.abs_mean * (1 + 1e-12)
    assert mismatch.k3 >= 0


@given(learner=LOGPROBS)
@settings(deadline=None)
def test_equal_policies_have_none(learner: np.ndarray) -> None:
    assert Mismatch.between([learner], [learner.copy()]) == Mismatch(0.0, 0.0, 0.0, 0.0, 0.0)


def test_tiny_differences_keep_their_divergence() -> None:
    """k3 is d^2/2 to first order: one float32 step at -1e-3 is 1.2e-10, lost in `exp(d) - 1` to cancellation."""
    sampler = np.full(3, -1e-3, dtype=np.float32)
    learner = np.nextafter(sampler, np.float32(-1))
    step = float(learner[0]) - float(sampler[0])
    assert Mismatch.between([learner], [sampler]).k3 == pytest.approx(step**2 / 2, rel=1e-4, abs=0)


def test_estimators_approach_the_divergence() -> None:
    rng = np.random.default_rng(0)
    sampler, learner = rng.dirichlet(np.ones(5)), rng.dirichlet(np.ones(5))
    tokens = rng.choice(5, size=200_000, p=sampler)
    log_sampler, log_learner = (np.log(p).astype(np.float32)[tokens] for p in (sampler, learner))
    mismatch = Mismatch.between([log_learner], [log_sampler])
    divergence = float(np.sum(sampler * np.log(sampler / learner)))
    assert mismatch.k1 == pytest.approx(divergence, rel=0.02)
    assert mismatch.k3 == pytest.approx(divergence, rel=0.02)


def test_what_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match="different lengths"):
        Mismatch.between(split([-1.0, -2.0], 1, 1), split([-1.0, -2.0], 2))
    with pytest.raises(ValueError, match="no token"):
        Mismatch.between([], [])
    with pytest.raises(ValueError, match="no token"):
        Mismatch.between(split([], 0), split([], 0))


def test_names_of_metrics() -> None:
    mismatch = Mismatch(1.0, 2.0, 3.0, 4.0, 5.0)
    assert mismatch.metrics("m/") == {
        "m/logp_abs_mean": 1.0,
        "m/logp_abs_p99": 2.0,
        "m/logp_abs_max": 3.0,
        "m/k1_kl": 4.0,
        "m/k3_kl": 5.0,
    }
    assert all(name.startswith("mismatch/") for name in mismatch.metrics())


def test_merge_by_each_metrics_own_reduction() -> None:
    parts = [
        {"loss": mean(6.0, 3), "worst": maximum(-2.0), "tokens": Metric(5.0, reduction="sum")},
        {"loss": mean(2.0, 1), "worst": maximum(-7.0), "tokens": Metric(8.0, reduction="sum"), "once": mean(1.0, 2)},
    ]
    assert merge(parts) == {"loss": 2.0, "worst": -2.0, "tokens": 13.0, "once": 0.5}
    assert merge([]) == {}


def test_mean_of_nothing_is_left_out() -> None:
    assert merge([{"a": mean(0.0, 0)}, {"a": mean(0.0, 0), "b": mean(3.0, 1)}]) == {"b": 3.0}


def test_two_reductions_of_one_name() -> None:
    with pytest.raises(ValueError, match="metric a has two reductions"):
        merge([{"a": mean(1.0, 1)}, {"a": maximum(1.0)}])


@given(values=st.lists(st.tuples(st.floats(-10, 10), st.integers(1, 5)), min_size=1, max_size=6))
@settings(deadline=None)
def test_mean_is_weighted(values: list[tuple[float, int]]) -> None:
    merged = merge({"a": mean(value * weight, weight)} for value, weight in values)
    numbers, weights = zip(*values, strict=True)
    assert merged["a"] == pytest.approx(np.average(numbers, weights=weights), rel=1e-9, abs=1e-9)

"""Success rates, spreads and totals."""

from __future__ import annotations

import math

import numpy as np
import pytest

from qarl.config.pool import PoolConfig
from qarl.errors import DataError
from qarl.prompts.pool import Pool
from qarl.types import GroupResult, Prompt
from tests.support.pool import STRATEGIES, Strategy, ids, prompts


def test_metrics_of_observed_groups() -> None:
    pool = Pool(prompts(8), PoolConfig(target=0.5, prior_strength=2.0, cooldown_steps=0), seed=0)
    assert pool.metrics()["pool/success_mean"] == 0.5
    rewards = [(1.0, 1.0), (0.0, 0.0), (1.0, 0.0), (1.0, 1.0)]
    pool.observe([GroupResult(i, r) for i, r in zip(ids(pool.draw(4, 0)), rewards, strict=True)], 0)
    metrics = pool.metrics()
    assert metrics["pool/zero_variance_share"] == 0.75
    assert metrics["pool/success_mean"] == pytest.approx((0.75 + 0.25 + 0.5 + 0.75) / 4)
    pool.draw(8, 1)
    assert pool.metrics()["pool/frontier_width"] == 0.25


@pytest.mark.parametrize("rewards", [(), (1.1,), (-0.1, 0.5), (math.nan,), (0.5, math.inf)])
def test_bad_rewards_are_refused_and_nothing_is_recorded(rewards: tuple[float, ...]) -> None:
    pool = Pool(prompts(2), PoolConfig(), seed=0)
    good, bad = ids(pool.draw(2, 0))
    before = pool.state_dict()
    with pytest.raises(DataError, match=f"prompt '{bad}'"):
        pool.observe([GroupResult(good, (1.0,)), GroupResult(bad, rewards)], 0)
    assert pool.state_dict() == before


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("count", [-3, 2**63])
def test_impossible_counts_are_refused_and_nothing_changes(strategy: Strategy, count: int) -> None:
    pool = Pool(prompts(3), PoolConfig(strategy=strategy), seed=0)
    pool.draw(1, 0)
    before = pool.state_dict()
    with pytest.raises(DataError, match=f"prompt pool: n is {count}; it counts from 0"):
        pool.draw(count, 0)
    with pytest.raises(DataError, match=f"step is {count}"):
        pool.draw(1, count)
    with pytest.raises(DataError, match=f"step is {count}"):
        pool.observe([GroupResult(i, (1.0,)) for i in before["in_flight"]], count)
    assert pool.state_dict() == before


def test_estimates_are_told_apart_from_measurements() -> None:
    pool = Pool(prompts(1), PoolConfig(exploration=0.0, cooldown_steps=0), seed=0)
    pool.observe([GroupResult(pool.draw(1, 0)[0].id, (1.0, 1.0))], 0)  # rate (2 + 1) / (2 + 2)
    pool.add(Prompt("child", "", "", ()), "p0", difficulty=2.0)
    assert pool.metrics()["pool/estimated"] == 1
    assert pool.metrics()["pool/success_mean"] == 0.75  # seen ones only
    pool.observe([GroupResult(i, (1.0, 0.0)) for i in ids(pool.draw(2, 1)) if i == "child"], 1)
    metrics = pool.metrics()
    assert metrics["pool/estimated"] == 0
    assert metrics["pool/estimate_error"] == pytest.approx(0.75**2 - 0.5)
    assert metrics["pool/success_mean"] == pytest.approx((0.75 + (1 + 2 * 0.75**2) / 4) / 2)


@pytest.mark.parametrize("estimated", [False, True])
@pytest.mark.parametrize("rewards", [(), (1.0,), (0.0, 1.0, 1.0), (0.0,) * 8, (0.5, 0.25)])
def test_spread_is_the_expected_standard_deviation_of_a_reward(rewards: tuple[float, ...], estimated: bool) -> None:
    """E sqrt(p (1 - p)) under the Beta posterior, by quadrature."""
    pool = Pool(prompts(1), PoolConfig(target=0.4, prior_strength=3.0, cooldown_steps=0), seed=0)
    pool.add(Prompt("child", "", "", ()), "p0" if estimated else "", difficulty=2.0)
    mean, strength = (0.4**2, 2.0) if estimated else (0.4, 3.0)
    if rewards:
        pool.draw(2, 0)
        pool.observe([GroupResult("child", rewards)], 0)
    a = strength * mean + sum(rewards)
    b = strength * (1 - mean) + len(rewards) - sum(rewards)
    logit = np.linspace(-200, 200, 40_001)  # there, the density is smooth: p^a (1 - p)^b
    log_p, log_q = -np.logaddexp(0, -logit), -np.logaddexp(0, logit)
    weight = np.exp(a * log_p + b * log_q)
    expected = (weight * np.exp((log_p + log_q) / 2)).sum() / weight.sum()
    assert pool.spread("child") == pytest.approx(expected, rel=1e-6)


def test_a_certain_prompt_has_no_spread_and_an_unknown_one_is_an_error() -> None:
    pool = Pool(prompts(1), PoolConfig(target=1.0), seed=0)
    pool.observe([GroupResult(pool.draw(1, 0)[0].id, (1.0, 1.0))], 0)
    assert pool.spread("p0") == 0.0
    with pytest.raises(KeyError):
        pool.spread("p1")

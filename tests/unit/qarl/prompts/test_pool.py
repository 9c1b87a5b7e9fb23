"""Draws, results, growth and eviction, case by case."""

from __future__ import annotations

import random

import pytest

from qarl.config.pool import ArchiveConfig, PoolConfig, RetireConfig
from qarl.errors import ConfigError, DataError
from qarl.prompts.allocation import allocate
from qarl.prompts.pool import Pool
from qarl.types import GroupResult, Prompt
from tests.support.pool import STRATEGIES, Strategy, ids, prompts, through_json


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_abort_restores_the_pool(strategy: Strategy) -> None:
    pool = Pool(prompts(20), PoolConfig(strategy=strategy, cooldown_steps=0), seed=1)
    for step in range(4):
        pool.observe([GroupResult(i, (1.0, 0.0, step % 2)) for i in ids(pool.draw(6, step))], step)
    pool.draw(0, 4)
    before = pool.state_dict()
    pool.abort(ids(pool.draw(9, 4)))
    after = pool.state_dict()
    for state in before, after:  # the generator and the clock have moved on, and the gauge tells of the last draw
        del state["rng"], state["gauges"]
    assert after == before


def test_cooldown_counts_steps_after_the_observation() -> None:
    pool = Pool(prompts(1), PoolConfig(cooldown_steps=2), seed=0)
    pool.observe([GroupResult(pool.draw(1, 5)[0].id, (1.0,))], 5)
    assert [len(pool.draw(1, step)) for step in (5, 6, 7, 8)] == [0, 0, 0, 1]


def test_late_results_of_an_aborted_draw_are_not_taken_for_those_of_the_next() -> None:
    pool = Pool(prompts(1), PoolConfig(), seed=0)
    pool.draw(1, 3)
    pool.abort(["p0"])
    pool.draw(1, 4)
    pool.observe([GroupResult("p0", (0.0,), drawn_at=3)], 4)
    assert (pool.metrics()["pool/in_flight"], pool.metrics()["pool/unknown_results"]) == (1, 1)
    pool.observe([GroupResult("p0", (1.0,), drawn_at=4)], 4)
    pool.observe([GroupResult("p0", (1.0,), drawn_at=4)], 4)
    metrics = pool.metrics()
    assert (metrics["pool/cooling"], metrics["pool/unknown_results"]) == (1, 2)
    assert metrics["pool/success_mean"] == pytest.approx((1 + 2 * 0.5) / 3)


@pytest.mark.parametrize("rows", [[], [*prompts(3), *prompts(1)]])
def test_prompts_must_exist_and_be_unique(rows: list[Prompt]) -> None:
    with pytest.raises(DataError, match="no prompts" if not rows else "'p0' is not unique"):
        Pool(rows, PoolConfig(), seed=0)


@pytest.mark.parametrize("prompt_id", ["p0", "gone"])
def test_an_id_is_never_used_twice(prompt_id: str) -> None:
    pool = Pool([*prompts(2), Prompt("gone", "", "", ())], PoolConfig(capacity=3), seed=0)
    pool.observe([GroupResult(i, (float(i != "gone") / 2,)) for i in ids(pool.draw(3, 0))], 0)
    assert pool.add(Prompt("better", "", "", ()))  # unseen, at the target: the unsolved one leaves
    assert pool.metrics()["pool/evicted"] == 1
    with pytest.raises(DataError, match=f"'{prompt_id}' is not unique"):
        pool.add(Prompt(prompt_id, "", "", ()))


def test_more_prompts_than_capacity_are_refused() -> None:
    with pytest.raises(ConfigError, match="2 is less than the 3 prompts"):
        Pool(prompts(3), PoolConfig(capacity=2), seed=0)
    state = Pool(prompts(3), PoolConfig(), seed=0)
    state.add(Prompt("new", "", "", ()))
    with pytest.raises(ConfigError, match="has 4 prompts"):
        Pool(prompts(3), PoolConfig(capacity=3), seed=0).load_state_dict(through_json(state))


def test_an_archive_needs_a_capacity() -> None:
    with pytest.raises(ValueError, match="set both"):
        PoolConfig(archive=ArchiveConfig(capacity=1))


def test_the_augmented_share_counts_those_whose_parent_has_gone() -> None:
    pool = Pool(prompts(2), PoolConfig(capacity=3, cooldown_steps=0), seed=0)
    pool.observe([GroupResult(i, (0.0, 1.0)) for i in ids(pool.draw(2, 0))], 0)
    assert pool.add(Prompt("child", "", "", ()), "p0")
    pool.draw(3, 1)
    pool.observe([GroupResult("p0", (0.0,) * 8)], 1)
    assert pool.add(Prompt("stray", "", "", ()))  # p0, the farthest, leaves
    assert pool.metrics()["pool/augmented_share"] == pytest.approx(2 / 3)
    other = Pool(prompts(2), PoolConfig(capacity=3), seed=0)
    other.load_state_dict(through_json(pool))
    assert other.metrics()["pool/augmented_share"] == pytest.approx(2 / 3)


def test_solved_prompts_retire_until_their_recheck() -> None:
    retire = RetireConfig(after_visits=2, recheck_after_steps=5)
    pool = Pool(prompts(1), PoolConfig(cooldown_steps=0, retire=retire), seed=0)
    drawn_at = []
    for step in range(20):
        for prompt in pool.draw(1, step):
            drawn_at.append(step)
            pool.observe([GroupResult(prompt.id, (1.0 if step < 7 else 0.5,) * 4)], step)
    assert drawn_at[:4] == [0, 1, 7, 8]  # no longer solved at 7: its mean is 0.76
    assert pool.metrics()["pool/retired"] == 0


def test_the_frontier_is_measured_and_within_reach() -> None:
    pool = Pool(prompts(5), PoolConfig(prior_strength=1e-9), seed=0)
    pool.draw(5, 0)
    pool.observe([GroupResult(f"p{i}", (rate,)) for i, rate in enumerate([0.2, 0.4, 0.5, 0.8])], 0)
    assert pool.frontier(["p4", "p3", "p2", "p1", "gone"], reach=0.15) == ["p2", "p1"]


def test_draws_and_results_may_interleave() -> None:
    """An asynchronous loop: several steps are in flight, results are late, partial, refilled, aborted or doubled."""
    rng = random.Random(0)
    pool = Pool(prompts(40), PoolConfig(cooldown_steps=0), seed=0)
    flying: dict[str, int] = {}
    seen: set[str] = set()
    for step in range(60):
        drawn = ids(pool.draw(6, step))
        sizes = allocate([pool.spread(i) for i in drawn], 8 * len(drawn), 4, 16)
        assert sum(sizes) == 8 * len(drawn)
        assert not flying.keys() & set(drawn)
        flying |= dict(zip(drawn, sizes, strict=True))
        landing = rng.sample(sorted(flying), min(len(flying), rng.randrange(9)))
        results = [GroupResult(i, (float(rng.random() < 0.3),) * rng.randint(1, flying[i])) for i in landing]
        pool.observe(results + results[:1], step)
        seen.update(landing)
        dropped = [r.prompt_id for r in results if len(set(r.rewards)) == 1]
        flying = {i: size for i, size in flying.items() if i not in landing}
        refill = ids(pool.draw(len(dropped), step))  # of the same step: nothing that has just landed comes back
        assert not set(refill) & {*landing, *flying}
        flying |= dict.fromkeys(refill, 8)
        if step % 7 == 0 and flying:
            pool.abort([gone := next(iter(flying))])
            del flying[gone]
        assert pool.metrics()["pool/in_flight"] == len(flying)
    assert len(seen) > 30
    assert pool.metrics()["pool/size"] == 40

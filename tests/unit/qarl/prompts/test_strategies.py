"""What each strategy draws."""

from __future__ import annotations

import random

import pytest

from qarl.config.pool import PoolConfig
from qarl.prompts.pool import Pool
from qarl.types import GroupResult
from tests.support.pool import Strategy, ids, prompts, through_json


@pytest.mark.parametrize("strategy", ["frontier", "uniform", "prioritised", "easy_to_hard"])
def test_a_fresh_pool_draws_in_seeded_order(strategy: Strategy) -> None:
    config = PoolConfig(strategy=strategy)
    first, same, other = (ids(Pool(prompts(50), config, seed).draw(50, 0)) for seed in (1, 1, 2))
    assert first == same
    assert first != other
    assert sorted(first) == sorted(other) == sorted(ids(prompts(50)))


def test_the_frontier_picks_at_random_from_twice_as_many() -> None:
    pool = Pool(prompts(9), PoolConfig(exploration=0.0, cooldown_steps=0), seed=0)
    rates = {i: k / 8 for k, i in enumerate(ids(pool.draw(9, 0)))}
    pool.observe([GroupResult(i, (rate,)) for i, rate in rates.items()], 0)
    met: set[float] = set()
    for _ in range(30):
        drawn = ids(pool.draw(2, 1))
        pool.abort(drawn)
        met.update(rates[i] for i in drawn)
    assert met == {3 / 8, 4 / 8, 5 / 8, 6 / 8}  # two below or at the target 0.5, two above


def test_uniform_visits_every_prompt_once_per_epoch_in_new_order() -> None:
    pool = Pool(prompts(12), PoolConfig(strategy="uniform", cooldown_steps=0), seed=0)
    drawn: list[str] = []
    for step in range(6):
        drawn += (batch := ids(pool.draw(4, step)))
        pool.observe([GroupResult(i, (1.0,)) for i in batch], step)
    assert sorted(drawn[:12]) == sorted(drawn[12:]) == sorted(ids(prompts(12)))
    assert drawn[:12] != drawn[12:]


def test_reach_draws_unseen_prompts_instead_of_far_ones() -> None:
    far, near = (PoolConfig(exploration=0.0, cooldown_steps=0, reach=reach) for reach in (1.0, 0.3))
    unseen = {}
    for name, config in {"far": far, "near": near}.items():
        pool = Pool(prompts(20), config, seed=0)
        pool.observe([GroupResult(i, (0.0,) * 8) for i in ids(pool.draw(10, 0))], 0)  # rate 0.1
        before = pool.metrics()["pool/cold"]
        pool.draw(6, 1)
        unseen[name] = before - pool.metrics()["pool/cold"]
    assert unseen == {"far": 0, "near": 6}


def test_prioritised_draws_by_weight() -> None:
    """Two classes of prompts, nearness 1 and 0.5: they are drawn 2 to 1, whatever was drawn before."""
    pool = Pool(prompts(400), PoolConfig(strategy="prioritised", cooldown_steps=0, decay=0.0, prior_strength=1e-9), 0)
    reward = {f"p{i}": 0.5 if i % 2 else 0.25 for i in range(400)}
    pool.observe([GroupResult(i, (reward[i],)) for i in ids(pool.draw(400, 0))], 0)
    near = 0
    for step in range(1, 1001):
        drawn = ids(pool.draw(10, step))
        near += sum(reward[i] == 0.5 for i in drawn)
        pool.observe([GroupResult(i, (reward[i],)) for i in drawn], step)
    assert near / 10_000 == pytest.approx(2 / 3, abs=0.02)  # four standard deviations


def test_the_largest_priority_exponent_leaves_the_clock_exact() -> None:
    """The farthest prompts wait longest; beyond that the waiting would be infinite, and the state unreadable."""
    config = PoolConfig(strategy="prioritised", priority_exponent=8.0, cooldown_steps=0, prior_strength=1e-9)
    pool, other = (Pool(prompts(4), config, seed=0) for _ in range(2))
    for step in range(20):
        pool.observe([GroupResult(i, (1.0,)) for i in ids(pool.draw(4, step))], step)
    assert pool._strategy.clock < 2**53
    other.load_state_dict(through_json(pool))
    assert ids(other.draw(2, 20)) == ids(pool.draw(2, 20))


def test_easy_to_hard_goes_by_level_then_by_success() -> None:
    pool = Pool(prompts(6), PoolConfig(strategy="easy_to_hard", cooldown_steps=0), seed=0)
    drawn = pool.draw(6, 0)
    assert [prompt.level for prompt in drawn] == [0, 0, 1, 1, 2, 2]
    pool.observe([GroupResult(f"p{i}", (float(i >= 3),)) for i in range(6)], 0)
    assert ids(pool.draw(6, 1)) == ["p3", "p0", "p4", "p1", "p5", "p2"]


def informative_share(strategy: Strategy, solved: float, steps: int) -> float:
    """Share of drawn prompts with 0 < p < 1 when `solved` of all have p = 1 and half of the others p = 0."""
    rng = random.Random(0)
    unsolved = [0.0, 0.0, 0.0, 0.3, 0.5, 0.7]
    chance = {p.id: 1.0 if rng.random() < solved else rng.choice(unsolved) for p in prompts(400)}
    pool = Pool(prompts(400), PoolConfig(strategy=strategy), seed=0)
    informative = total = 0
    for step in range(steps):
        drawn = ids(pool.draw(16, step))
        pool.observe([GroupResult(i, tuple(float(rng.random() < chance[i]) for _ in range(8))) for i in drawn], step)
        informative += sum(0 < chance[i] < 1 for i in drawn)
        total += len(drawn)
    return informative / total


def test_frontier_finds_the_informative_prompts_among_solved_ones() -> None:
    uniform = informative_share("uniform", solved=0.7, steps=100)
    frontier = informative_share("frontier", solved=0.7, steps=100)
    assert uniform < 0.2
    assert frontier > 2.5 * uniform

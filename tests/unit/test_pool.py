"""The pool against a brute-force oracle that sorts everything at every draw."""

from __future__ import annotations

import json
import math
import random
from itertools import zip_longest
from typing import Any, Literal

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from qarl.config import PoolConfig
from qarl.errors import CheckpointError, DataError
from qarl.prompts.pool import FrontierPool, UniformPool, make_pool
from qarl.types import GroupResult, Prompt

Strategy = Literal["frontier", "uniform"]
STRATEGIES: list[Strategy] = ["frontier", "uniform"]
CONFIGS = st.builds(
    PoolConfig,
    strategy=st.sampled_from(STRATEGIES),
    target=st.sampled_from([0.0, 0.3, 0.5, 1.0]),
    exploration=st.sampled_from([0.0, 0.4, 1.0]),
    cooldown_steps=st.integers(0, 3),
    decay=st.sampled_from([0.0, 0.7, 1.0]),
    stale_after_steps=st.sampled_from([1, 3, 6]),
)
RANDOMS = st.integers(0, 99).map(random.Random)


def prompts(n: int) -> list[Prompt]:
    return [Prompt(f"p{i}", "", "", ()) for i in range(n)]


def ids(drawn: list[Prompt]) -> list[str]:
    return [prompt.id for prompt in drawn]


def through_json(pool: FrontierPool) -> Any:
    return json.loads(json.dumps(pool.state_dict()))


class PoolMachine(RuleBasedStateMachine):
    """`where` and `history` are the oracle; tickets (the seeded random order) are read from the pool's state.

    `twin` is a pool loaded from `pool`'s state mid-run: from then on both get the same calls.
    """

    @initialize(config=CONFIGS, size=st.integers(1, 16), seed=st.integers(0, 3))
    def start(self, config: PoolConfig, size: int, seed: int) -> None:
        self.config, self.prompts, self.step = config, prompts(size), 0
        self.pool = self.make(seed)
        self.twin = self.make(seed)
        self.where = {p.id: "eligible" for p in self.prompts}
        self.history: dict[str, list[tuple[int, tuple[float, ...]]]] = {p.id: [] for p in self.prompts}
        self.unknown = 0

    def make(self, seed: int) -> FrontierPool:
        pool = make_pool(self.prompts, self.config, seed)
        assert isinstance(pool, FrontierPool)
        return pool

    def of_state(self, state: str) -> list[str]:
        return [prompt_id for prompt_id, at in self.where.items() if at == state]

    def rate(self, prompt_id: str) -> float:
        successes = trials = 0.0
        for _, rewards in self.history[prompt_id]:
            successes = self.config.decay * successes + sum(rewards)
            trials = self.config.decay * trials + len(rewards)
        prior = self.config.prior_strength
        return (prior * self.config.target + successes) / (prior + trials)

    def check_draw(self, drawn: list[str], n: int) -> None:
        """`drawn` is the exploration that sorting gives, then m of the 2m of the frontier, then the rest of cold."""
        config = self.config
        ticket = {key: record["ticket"] for key, record in self.pool.state_dict()["records"].items()}
        eligible = self.of_state("eligible")
        assert len(drawn) == len(set(drawn)) == min(n, len(eligible))
        if config.strategy == "uniform":
            assert drawn == sorted(eligible, key=lambda i: (len(self.history[i]), ticket[i]))[:n]
            return
        last = {i: self.history[i][-1][0] if self.history[i] else -math.inf for i in eligible}
        due = sorted(
            (i for i in eligible if last[i] <= self.step - config.stale_after_steps), key=lambda i: (last[i], ticket[i])
        )
        explored = due[: round(config.exploration * n)]
        rest = [i for i in eligible if i not in explored]
        seen = [i for i in rest if self.history[i]]
        seen.sort(key=lambda i: (abs(self.rate(i) - config.target), last[i], ticket[i]))
        low = [i for i in seen if self.rate(i) <= config.target]
        high = [i for i in seen if self.rate(i) > config.target]
        m = n - len(explored)
        window = [i for pair in zip_longest(low, high) for i in pair if i is not None][: 2 * m]
        frontier = drawn[len(explored) : len(explored) + min(m, len(window))]
        assert drawn[: len(explored)] == explored
        assert set(frontier) <= set(window)
        cold = [i for i in due if i in rest and not self.history[i]]
        assert drawn[len(explored) + len(frontier) :] == cold[: m - len(frontier)]

    @rule(n=st.integers(0, 10), steps=st.integers(0, 3))
    def draw(self, n: int, steps: int) -> None:
        self.step += steps
        for i in self.of_state("cooling"):
            if self.step > self.history[i][-1][0] + self.config.cooldown_steps:
                self.where[i] = "eligible"
        drawn = ids(self.pool.draw(n, self.step))
        assert ids(self.twin.draw(n, self.step)) == drawn
        self.check_draw(drawn, n)
        for i in drawn:
            self.where[i] = "in_flight"

    @rule(data=st.data(), repeat=st.booleans())
    def observe_some(self, data: st.DataObject, repeat: bool) -> None:
        chosen = data.draw(st.lists(st.sampled_from([*self.where, "unknown"]), max_size=6))
        self.observe(chosen, data.draw(RANDOMS), calls=2 if repeat else 1)

    @rule(rng=RANDOMS)
    def observe_all(self, rng: random.Random) -> None:
        self.observe(self.of_state("in_flight"), rng, calls=1)

    def observe(self, chosen: list[str], rng: random.Random, calls: int) -> None:
        results = [GroupResult(i, tuple(rng.choices([0.0, 0.5, 1.0], k=2))) for i in chosen]
        for _ in range(calls):
            self.pool.observe(results, self.step)
            self.twin.observe(results, self.step)
        accepted = 0
        for result in results:
            if self.where.get(result.prompt_id) == "in_flight":
                self.where[result.prompt_id] = "cooling"
                self.history[result.prompt_id].append((self.step, result.rewards))
                accepted += 1
        self.unknown += calls * len(results) - accepted

    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        chosen = data.draw(st.lists(st.sampled_from([*self.where, "unknown"]), max_size=6))
        self.pool.abort(chosen)
        self.twin.abort(chosen)
        for i in chosen:
            if self.where.get(i) == "in_flight":
                self.where[i] = "eligible"

    @rule()
    def restart(self) -> None:
        """The process dies: what was in flight is lost, the twin goes on from the saved state."""
        self.twin = self.make(seed=99)
        self.twin.load_state_dict(through_json(self.pool))
        in_flight = self.of_state("in_flight")
        self.pool.abort(in_flight)
        self.where.update(dict.fromkeys(in_flight, "eligible"))
        assert self.twin.state_dict() == self.pool.state_dict()

    @invariant()
    def conserves(self) -> None:
        low = [i for i in self.of_state("eligible") if self.history[i] and self.rate(i) <= self.config.target]
        high = [i for i in self.of_state("eligible") if self.history[i] and self.rate(i) > self.config.target]
        counts = {
            "size": len(self.prompts),
            "cold": len(self.of_state("eligible")) - len(low) - len(high),
            "low": len(low),
            "high": len(high),
            "in_flight": len(self.of_state("in_flight")),
            "cooling": len(self.of_state("cooling")),
            "unknown_results": self.unknown,
        }
        metrics = self.pool.metrics()
        assert {name: metrics[f"pool/{name}"] for name in counts} == counts
        assert all(isinstance(value, float) and math.isfinite(value) for value in metrics.values())
        state = self.pool.state_dict()
        assert state["in_flight"] == sorted(self.of_state("in_flight"))
        assert state["cooling"] == sorted(self.of_state("cooling"))
        assert [i for i in self.where if i in self.pool._low] == low
        assert [i for i in self.where if i in self.pool._high] == high

    def teardown(self) -> None:
        if not hasattr(self, "pool"):
            return
        self.pool.abort(list(self.where))
        drawn = ids(self.pool.draw(len(self.where) + 1, self.step + self.config.cooldown_steps + 1))
        assert sorted(drawn) == sorted(self.where)  # every prompt becomes eligible again


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_abort_restores_the_pool(strategy: Strategy) -> None:
    pool = make_pool(prompts(20), PoolConfig(strategy=strategy, cooldown_steps=0), seed=1)
    for step in range(4):
        pool.observe([GroupResult(i, (1.0, 0.0, step % 2)) for i in ids(pool.draw(6, step))], step)
    pool.draw(0, 4)
    before = pool.state_dict()
    pool.abort(ids(pool.draw(9, 4)))
    after = pool.state_dict()
    for state in before, after:  # the generator has moved on, and the gauge tells of the last draw
        del state["rng"], state["frontier_width"]
    assert after == before


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_fresh_pool_draws_in_seeded_order(strategy: Strategy) -> None:
    config = PoolConfig(strategy=strategy)
    first, same, other = (ids(make_pool(prompts(50), config, seed).draw(50, 0)) for seed in (1, 1, 2))
    assert first == same
    assert first != other
    assert sorted(first) == sorted(other) == sorted(ids(prompts(50)))


def test_the_frontier_picks_at_random_from_twice_as_many() -> None:
    pool = make_pool(prompts(9), PoolConfig(exploration=0.0, cooldown_steps=0), seed=0)
    rates = {i: k / 8 for k, i in enumerate(ids(pool.draw(9, 0)))}
    pool.observe([GroupResult(i, (rate,)) for i, rate in rates.items()], 0)
    met: set[float] = set()
    for _ in range(30):
        drawn = ids(pool.draw(2, 1))
        pool.abort(drawn)
        met.update(rates[i] for i in drawn)
    assert met == {3 / 8, 4 / 8, 5 / 8, 6 / 8}  # two below or at the target 0.5, two above


def test_cooldown_counts_steps_after_the_observation() -> None:
    pool = make_pool(prompts(1), PoolConfig(cooldown_steps=2), seed=0)
    pool.observe([GroupResult(pool.draw(1, 5)[0].id, (1.0,))], 5)
    assert [len(pool.draw(1, step)) for step in (5, 6, 7, 8)] == [0, 0, 0, 1]


def test_uniform_visits_every_prompt_once_per_epoch_in_new_order() -> None:
    pool = make_pool(prompts(12), PoolConfig(strategy="uniform", cooldown_steps=0), seed=0)
    drawn: list[str] = []
    for step in range(6):
        drawn += (batch := ids(pool.draw(4, step)))
        pool.observe([GroupResult(i, (1.0,)) for i in batch], step)
    assert isinstance(pool, UniformPool)
    assert sorted(drawn[:12]) == sorted(drawn[12:]) == sorted(ids(prompts(12)))
    assert drawn[:12] != drawn[12:]


def test_metrics_of_observed_groups() -> None:
    pool = make_pool(prompts(8), PoolConfig(target=0.5, prior_strength=2.0, cooldown_steps=0), seed=0)
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
    pool = make_pool(prompts(2), PoolConfig(), seed=0)
    good, bad = ids(pool.draw(2, 0))
    before = pool.state_dict()
    with pytest.raises(DataError, match=f"prompt '{bad}'"):
        pool.observe([GroupResult(good, (1.0,)), GroupResult(bad, rewards)], 0)
    assert pool.state_dict() == before


@pytest.mark.parametrize("rows", [[], [*prompts(3), *prompts(1)]])
def test_prompts_must_exist_and_be_unique(rows: list[Prompt]) -> None:
    with pytest.raises(DataError, match="no prompts" if not rows else "'p0' is not unique"):
        make_pool(rows, PoolConfig(), seed=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 0}, "version 0"),
        ({"records": {}}, "4 prompt ids"),
        ({"records": {"p0": {"no": 1}}}, "damaged"),
        ({"rng": [1, 2]}, "damaged"),
        ({"cooling": None}, "damaged"),
        ({"cooling": ["p0"], "in_flight": ["p0"]}, "two states"),
        ({"cooling": ["p9"]}, "unknown"),
    ],
)
def test_foreign_states_are_refused_and_the_pool_stays(change: dict[str, Any], message: str) -> None:
    pool = FrontierPool(prompts(4), PoolConfig(), seed=0)
    pool.draw(2, 0)
    before = pool.state_dict()
    with pytest.raises(CheckpointError, match=message):
        pool.load_state_dict({**through_json(pool), **change})
    assert pool.state_dict() == before


def test_state_of_another_data_set_is_refused() -> None:
    state = make_pool(prompts(5), PoolConfig(), seed=0).state_dict()
    with pytest.raises(CheckpointError, match="1 prompt ids are not in both the state and the task, first 'p4'"):
        make_pool(prompts(4), PoolConfig(), seed=0).load_state_dict(state)


def informative_share(strategy: Strategy, solved: float, steps: int) -> float:
    """Share of drawn prompts with 0 < p < 1 when `solved` of all have p = 1 and half of the others p = 0."""
    rng = random.Random(0)
    unsolved = [0.0, 0.0, 0.0, 0.3, 0.5, 0.7]
    chance = {p.id: 1.0 if rng.random() < solved else rng.choice(unsolved) for p in prompts(400)}
    pool = make_pool(prompts(400), PoolConfig(strategy=strategy), seed=0)
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

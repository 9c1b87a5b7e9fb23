"""The pool against a brute-force oracle that sorts everything at every draw."""

from __future__ import annotations

import base64
import json
import math
import random
from array import array
from itertools import zip_longest
from statistics import fmean
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from qarl.config.pool import ArchiveConfig, LineageConfig, PoolConfig, RetireConfig
from qarl.errors import CheckpointError, ConfigError, DataError
from qarl.prompts.allocation import allocate
from qarl.prompts.heap import sortable
from qarl.prompts.pool import Pool, make_pool
from qarl.prompts.state import parse
from qarl.prompts.stats import COLUMNS
from qarl.prompts.strategies import LEAST_NEARNESS, Frontier, Median
from qarl.types import GroupResult, Prompt
from tests.unit.qarl.prompts.test_lineage import MODES
from tests.unit.qarl.prompts.test_lineage import make as make_forest

Strategy = Literal["frontier", "uniform", "median", "prioritised", "easy_to_hard"]
STRATEGIES: list[Strategy] = ["frontier", "uniform", "median", "prioritised", "easy_to_hard"]
RANDOMS = st.integers(0, 99).map(random.Random)


@st.composite
def configs(draw: st.DrawFn, size: int) -> PoolConfig:
    capacity = draw(st.none() | st.integers(size, size + 3))
    target = draw(st.sampled_from([0.0, 0.3, 0.5, 1.0]))
    archived = draw(st.integers(0, 3)) if capacity else 0
    return PoolConfig(
        strategy=draw(st.sampled_from(STRATEGIES)),
        target=target,
        exploration=draw(st.sampled_from([0.0, 0.4, 1.0])),
        cooldown_steps=draw(st.integers(0, 3)),
        decay=draw(st.sampled_from([0.0, 0.7, 1.0])),
        stale_after_steps=draw(st.sampled_from([1, 3, 6])),
        reach=draw(st.sampled_from([0.0, 0.2, 1.0])),
        capacity=capacity,
        retire=RetireConfig(
            after_visits=draw(st.integers(0, 2)),
            solved_above=max(target, draw(st.sampled_from([0.7, 1.0]))),
            hopeless_below=min(target, draw(st.sampled_from([0.0, 0.2]))),
            recheck_after_steps=draw(st.integers(1, 5)),
        ),
        lineage=LineageConfig(refresh_every=draw(st.integers(0, 3)), aggregate=draw(st.sampled_from(MODES))),
        archive=ArchiveConfig(
            capacity=archived,
            reinsert_per_step=draw(st.integers(0, 2)) if archived else 0,
            rest_steps=draw(st.integers(1, 3)),
        ),
    )


def prompts(n: int) -> list[Prompt]:
    return [Prompt(f"p{i}", "", "", (), level=i % 3) for i in range(n)]


def ids(drawn: list[Prompt]) -> list[str]:
    return [prompt.id for prompt in drawn]


def through_json(pool: Pool) -> Any:
    return json.loads(json.dumps(pool.state_dict(), allow_nan=False))


class PoolMachine(RuleBasedStateMachine):
    """`where`, `history` and `links` are the oracle, which sorts everything at every draw; the seeded random order
    (tickets) is read from the pool.

    `twin` is a pool loaded from `pool`'s state mid-run: from then on both get the same calls.
    """

    @initialize(data=st.data(), size=st.integers(1, 16), seed=st.integers(0, 3))
    def start(self, data: st.DataObject, size: int, seed: int) -> None:
        self.config, self.prompts, self.step = data.draw(configs(size)), prompts(size), 0
        self.pool, self.twin = self.make(seed), self.make(seed)
        self.where = {p.id: "eligible" for p in self.prompts}  # prompts in the pool
        self.level = {p.id: p.level for p in self.prompts}
        self.arrivals = ids(self.prompts)
        self.history: dict[str, list[tuple[int, tuple[float, ...]]]] = {p.id: [] for p in self.prompts}
        self.drawn_at: dict[str, int] = {}
        self.estimate: dict[str, float] = {}
        self.links: dict[str, tuple[str, float]] = {}
        self.archive: dict[str, int] = {}
        self.counts = {"unknown_results": 0, "evicted": 0, "refused": 0, "reinserted": 0}
        self.refreshed = self.reinserted = -1

    def make(self, seed: int) -> Pool:
        return make_pool(self.prompts, self.config, seed)

    # What the oracle knows

    def of_state(self, state: str) -> list[str]:
        return [prompt_id for prompt_id, at in self.where.items() if at == state]

    def column(self, name: str, prompt_id: str) -> float:
        if prompt_id in self.pool._slots:
            return float(getattr(self.pool._stats, name)[self.pool._slots[prompt_id]])
        return self.pool._archive[prompt_id].row[name]

    def ticket(self, prompt_id: str) -> float:
        return self.column("ticket", prompt_id)

    def last(self, prompt_id: str) -> int:
        return self.history[prompt_id][-1][0] if self.history[prompt_id] else -1

    def trials(self, prompt_id: str) -> tuple[float, float]:
        successes = trials = 0.0
        decay = 0.0 if self.config.strategy == "median" else self.config.decay
        for _, rewards in self.history[prompt_id]:
            successes = decay * successes + sum(rewards)
            trials = decay * trials + len(rewards)
        return successes, trials

    def measured(self, prompt_id: str) -> float:
        successes, trials = self.trials(prompt_id)
        return successes / trials

    def rate(self, prompt_id: str, own: bool = False) -> float:
        successes, trials = self.trials(prompt_id)
        prior, strength = self.config.target, self.config.prior_strength
        if prompt_id in self.estimate and not (own and trials):
            prior, strength = self.estimate[prompt_id], self.config.lineage.estimate_strength
        return (successes + strength * prior) / (trials + strength)

    def distance(self, prompt_id: str) -> float:
        return abs(self.rate(prompt_id) - self.config.target)

    def known(self, prompt_id: str) -> bool:
        return bool(self.history[prompt_id]) or prompt_id in self.estimate

    def far(self, prompt_id: str) -> float:
        if self.config.strategy != "median":
            return self.distance(prompt_id)
        return 1 - self.measured(prompt_id) if self.history[prompt_id] else 0.0

    # What a draw may be

    def check_draw(self, drawn: list[str], n: int, rng: random.Random) -> None:
        """`rng`: the pool's generator as it was before the draw."""
        eligible = self.of_state("eligible")
        assert len(drawn) == len(set(drawn)) == min(n, len(eligible))
        order = {
            "uniform": lambda i: (len(self.history[i]), self.ticket(i)),
            "easy_to_hard": lambda i: (len(self.history[i]), self.level[i], -self.rate(i), self.ticket(i)),
            "prioritised": lambda i: self.alarm(i),
        }.get(self.config.strategy)
        if order:
            assert drawn == sorted(eligible, key=order)[:n]
        elif self.config.strategy == "median":
            self.check_median(drawn, n, eligible, rng)
        else:
            self.check_frontier(drawn, n, eligible, rng)

    def alarm(self, prompt_id: str) -> float:
        nearness = 1 - self.distance(prompt_id) / max(self.config.target, 1 - self.config.target)
        waiting = -math.log1p(-self.ticket(prompt_id)) / max(nearness, LEAST_NEARNESS)
        return self.column("alarm_base", prompt_id) + waiting

    def check_median(self, drawn: list[str], n: int, eligible: list[str], rng: random.Random) -> None:
        """All unseen in the order of arrival, then m of the 2m around the median of the last rewards."""
        unseen = sorted((i for i in eligible if not self.history[i]), key=self.arrivals.index)[:n]
        seen = [i for i in eligible if self.history[i]]
        seen.sort(key=lambda i: (self.measured(i), self.last(i), self.ticket(i)))
        half = (len(seen) + 1) // 2
        m = n - len(unseen)
        window = by_turns(seen[:half][::-1], seen[half:], 2 * m)
        assert drawn == unseen + rng.sample(window, min(m, len(window)))

    def check_frontier(self, drawn: list[str], n: int, eligible: list[str], rng: random.Random) -> None:
        """Exploration, then m of the 2m of the frontier within reach, then unseen ones, then the frontier beyond."""
        left, rest = list(drawn), set(eligible)

        def turn(i: str) -> tuple[float, float]:
            return self.last(i), self.ticket(i)

        def take(expected: list[str]) -> None:
            assert left[: len(expected)] == expected
            del left[: len(expected)]
            rest.difference_update(expected)

        def wanted() -> int:
            return n - len(drawn) + len(left)

        def take_near(reach: float) -> None:
            near = [i for i in rest if self.known(i) and self.distance(i) <= reach]
            near.sort(key=lambda i: (self.distance(i), *turn(i)))
            low = [i for i in near if self.rate(i) <= self.config.target]
            high = [i for i in near if self.rate(i) > self.config.target]
            window = by_turns(low, high, 2 * wanted())
            take(rng.sample(window, min(wanted(), len(window))))

        due = [i for i in eligible if not self.history[i] or self.last(i) <= self.step - self.config.stale_after_steps]
        take(sorted(due, key=turn)[: round(self.config.exploration * n)])
        take_near(self.config.reach)
        take(sorted((i for i in rest if not self.history[i]), key=turn)[: wanted()])
        take_near(1.0)
        assert not left

    @rule(n=st.integers(0, 10), steps=st.integers(0, 3))
    def draw(self, n: int, steps: int) -> None:
        self.step += steps
        self.wake()
        if self.step > self.reinserted:
            self.reinserted = self.step
            self.reinsert()
        every = self.config.lineage.refresh_every
        if every and self.step >= self.refreshed + every:
            self.refreshed = self.step
            self.refresh()
        rng = random.Random()
        rng.setstate(self.pool._rng.getstate())
        drawn = ids(self.pool.draw(n, self.step))
        assert ids(self.twin.draw(n, self.step)) == drawn
        self.check_draw(drawn, n, rng)
        for i in drawn:
            self.where[i], self.drawn_at[i] = "in_flight", self.step

    def wake(self) -> None:
        rests = {"cooling": self.config.cooldown_steps, "retired": self.config.retire.recheck_after_steps}
        for i, at in self.where.items():
            if at in rests and self.step > self.last(i) + rests[at]:
                self.where[i] = "eligible"

    def refresh(self) -> None:
        forest = make_forest([(child, *link) for child, link in self.links.items()])
        result = forest.aggregate({i: self.rate(i, own=True) for i in forest.nodes()}, self.config.lineage.aggregate)
        self.estimate |= {i: result[i] for i in forest.parents()}

    # Results

    @rule(data=st.data(), repeat=st.booleans())
    def observe_some(self, data: st.DataObject, repeat: bool) -> None:
        chosen = data.draw(st.lists(st.sampled_from([*self.where, *self.archive, "unknown"]), max_size=6))
        self.observe(chosen, data.draw(RANDOMS), calls=2 if repeat else 1)

    @rule(n=st.integers(1, 10), rng=RANDOMS, times=st.integers(1, 4))
    def train(self, n: int, rng: random.Random, times: int) -> None:
        """Ordinary steps: they bring the pool to where most prompts have been seen."""
        for _ in range(times):
            self.draw(n, steps=1)
            self.observe(self.of_state("in_flight"), rng, calls=1)
            self.conserves()

    @rule(rng=RANDOMS)
    def observe_all(self, rng: random.Random) -> None:
        self.observe(self.of_state("in_flight"), rng, calls=1)

    def observe(self, chosen: list[str], rng: random.Random, calls: int) -> None:
        """Groups may be partial, of one to three rewards, and of an earlier draw than the one in flight."""
        results = []
        for i in chosen:
            drawn_at = rng.choice([None, self.drawn_at.get(i, 0), self.drawn_at.get(i, 0), rng.randint(-1, self.step)])
            results.append(GroupResult(i, tuple(rng.choices([0.0, 0.5, 1.0], k=rng.randint(1, 3))), drawn_at))
        for _ in range(calls):
            self.pool.observe(results, self.step)
            self.twin.observe(results, self.step)
        accepted = 0
        for result in results:
            i = result.prompt_id
            if self.where.get(i) == "in_flight" and result.drawn_at in (None, self.drawn_at[i]):
                self.history[i].append((self.step, result.rewards))
                accepted += 1
                retire, measured = self.config.retire, self.measured(i)
                settled = measured >= retire.solved_above or measured <= retire.hopeless_below
                enough = 0 < retire.after_visits <= len(self.history[i])
                self.where[i] = "retired" if enough and settled else "cooling"
        self.counts["unknown_results"] += calls * len(results) - accepted

    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        chosen = data.draw(st.lists(st.sampled_from([*self.where, "unknown"]), max_size=6))
        self.pool.abort(chosen)
        self.twin.abort(chosen)
        for i in chosen:
            if self.where.get(i) == "in_flight":
                self.where[i] = "eligible"

    # Growth

    @rule(data=st.data(), difficulty=st.sampled_from([0.5, 1.0, 2.0]))
    def add(self, data: st.DataObject, difficulty: float) -> None:
        new = Prompt(f"p{len(self.history)}", "text", "answer", (1, 2), level=1)
        parent = data.draw(st.sampled_from([*self.where, *self.archive, "", "unknown"]))
        self.history[new.id], self.level[new.id] = [], new.level
        if parent in self.where:
            self.estimate[new.id] = self.rate(parent) ** difficulty
            self.links[new.id] = (parent, difficulty)
        entered = self.enter(new.id)
        assert self.pool.add(new, parent, difficulty) is entered
        assert self.twin.add(new, parent, difficulty) is entered
        self.counts["refused"] += not entered

    def enter(self, new: str) -> bool:
        """Whether `new` finds room, perhaps by evicting the furthest."""
        candidates = [i for i, at in self.where.items() if at != "in_flight"]
        victim = min(candidates, key=lambda i: (-self.far(i), self.last(i), self.ticket(i)), default="")
        full = self.config.capacity is not None and len(self.where) == self.config.capacity
        if full and (not victim or self.far(victim) <= self.far(new)):
            self.prune(new)
            return False
        self.where[new] = "eligible"
        self.arrivals = [*(i for i in self.arrivals if i != new), new]
        if full:
            del self.where[victim]
            self.prune(victim)
            self.counts["evicted"] += 1
            self.remember(victim)
        return True

    def prune(self, gone: str) -> None:
        above = self.links.pop(gone, None)
        for child, (parent, difficulty) in list(self.links.items()):
            if parent == gone:
                del self.links[child]
                if above:
                    self.links[child] = (above[0], difficulty * above[1])

    def remember(self, prompt_id: str) -> None:
        self.archive[prompt_id] = self.step
        if len(self.archive) > self.config.archive.capacity:
            del self.archive[next(iter(self.archive))]

    def reinsert(self) -> None:
        config = self.config.archive
        for i, since in list(self.archive.items())[: config.reinsert_per_step]:
            if self.archive.get(i) == since and self.step > since + config.rest_steps:
                del self.archive[i]
                if self.enter(i):
                    self.counts["reinserted"] += 1
                else:
                    self.remember(i)

    # The process dies

    @rule()
    def restart(self) -> None:
        """What was in flight is lost, the twin goes on from the saved state."""
        self.twin = self.make(seed=99)
        self.twin.load_state_dict(through_json(self.pool))
        in_flight = self.of_state("in_flight")
        self.pool.abort(in_flight)
        self.where.update(dict.fromkeys(in_flight, "eligible"))
        assert self.twin.state_dict() == self.pool.state_dict()
        assert self.twin.metrics() == self.pool.metrics()

    @invariant()
    def conserves(self) -> None:
        rates = {i: self.rate(i) for i in self.of_state("eligible") if self.known(i)}
        low = {i for i, rate in rates.items() if rate <= self.config.target}
        sizes = {
            "size": len(self.where),
            "cold": len(self.of_state("eligible")) - len(rates),
            "low": len(low),
            "high": len(rates) - len(low),
            **{state: len(self.of_state(state)) for state in ("in_flight", "cooling", "retired")},
            "archived": len(self.archive),
            "estimated": sum(not self.history[i] and i in self.estimate for i in self.where),
        }
        metrics = self.pool.metrics()
        assert {name: metrics[f"pool/{name}"] for name in (*sizes, *self.counts)} == sizes | self.counts
        grown = self.where.keys() - set(ids(self.prompts))
        assert metrics["pool/augmented_share"] == len(grown) / len(self.where)
        assert all(isinstance(value, float) and math.isfinite(value) for value in metrics.values())
        assert self.config.capacity is None or len(self.where) <= self.config.capacity
        state = self.pool.state_dict()
        for name in ("in_flight", "cooling", "retired"):
            assert state[name] == sorted(self.of_state(name))
        assert sorted(state["ids"]) == sorted(self.where)
        assert {child: (parent, d) for child, parent, d in state["lineage"]} == self.links
        assert list(state["archive"]) == list(self.archive)
        self.check_histogram(metrics)
        self.check_heaps(low, rates.keys() - low)

    def check_heaps(self, low: set[str], high: set[str]) -> None:
        """The halves of the frontier, and what eviction would go by."""
        strategy, slots = self.pool._strategy, self.pool._slots
        if isinstance(strategy, Median):
            seen = [i for i in self.of_state("eligible") if self.history[i]]
            seen.sort(key=lambda i: (self.measured(i), self.last(i), self.ticket(i)))
            half = (len(seen) + 1) // 2
            low, high = set(seen[:half]), set(seen[half:])
        if isinstance(strategy, Median | Frontier):
            assert {i for i in self.where if slots[i] in strategy.low} == low
            assert {i for i in self.where if slots[i] in strategy.high} == high
        if self.config.capacity:
            may_leave = [i for i, at in self.where.items() if at != "in_flight"]
            far = self.pool._far
            entries = {i: far._live[slots[i]] for i in self.where if slots[i] in far}
            order = {i: (sortable(-self.far(i)), self.last(i) + 1, self.ticket(i)) for i in may_leave}
            assert entries == {i: far._pack(*order[i], slots[i]) for i in may_leave}

    def check_histogram(self, metrics: dict[str, float]) -> None:
        seen = [self.rate(i) for i in self.where if self.history[i]]
        assert metrics["pool/success_mean"] == pytest.approx(fmean(seen) if seen else self.config.target)
        shares = [metrics[f"pool/success_hist_{k}"] for k in range(10)]
        assert shares == [sum(min(int(10 * r), 9) == k for r in seen) / max(len(seen), 1) for k in range(10)]

    def teardown(self) -> None:
        if not hasattr(self, "pool"):
            return
        self.pool.abort(list(self.where))
        rest = max(self.config.cooldown_steps, self.config.retire.recheck_after_steps)
        later = self.pool.draw(len(self.where) + 4, self.step + rest + 1)
        assert len(later) == self.pool.metrics()["pool/size"] == self.pool.metrics()["pool/in_flight"]  # all come back
        if not self.archive:
            assert sorted(ids(later)) == sorted(self.where)


def by_turns(low: list[str], high: list[str], most: int) -> list[str]:
    return [i for pair in zip_longest(low, high) for i in pair if i is not None][:most]


TestPool = PoolMachine.TestCase
TestPool.settings = settings(
    max_examples=200, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_abort_restores_the_pool(strategy: Strategy) -> None:
    pool = make_pool(prompts(20), PoolConfig(strategy=strategy, cooldown_steps=0), seed=1)
    for step in range(4):
        pool.observe([GroupResult(i, (1.0, 0.0, step % 2)) for i in ids(pool.draw(6, step))], step)
    pool.draw(0, 4)
    before = pool.state_dict()
    pool.abort(ids(pool.draw(9, 4)))
    after = pool.state_dict()
    for state in before, after:  # the generator and the clock have moved on, and the gauge tells of the last draw
        del state["rng"], state["gauges"]
    assert after == before


@pytest.mark.parametrize("strategy", ["frontier", "uniform", "prioritised", "easy_to_hard"])
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


def test_late_results_of_an_aborted_draw_are_not_taken_for_those_of_the_next() -> None:
    pool = make_pool(prompts(1), PoolConfig(), seed=0)
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


def test_uniform_visits_every_prompt_once_per_epoch_in_new_order() -> None:
    pool = make_pool(prompts(12), PoolConfig(strategy="uniform", cooldown_steps=0), seed=0)
    drawn: list[str] = []
    for step in range(6):
        drawn += (batch := ids(pool.draw(4, step)))
        pool.observe([GroupResult(i, (1.0,)) for i in batch], step)
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


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("count", [-3, 2**63])
def test_impossible_counts_are_refused_and_nothing_changes(strategy: Strategy, count: int) -> None:
    pool = make_pool(prompts(3), PoolConfig(strategy=strategy), seed=0)
    pool.draw(1, 0)
    before = pool.state_dict()
    with pytest.raises(DataError, match=f"prompt pool: n is {count}; it counts from 0"):
        pool.draw(count, 0)
    with pytest.raises(DataError, match=f"step is {count}"):
        pool.draw(1, count)
    with pytest.raises(DataError, match=f"step is {count}"):
        pool.observe([GroupResult(i, (1.0,)) for i in before["in_flight"]], count)
    assert pool.state_dict() == before


@pytest.mark.parametrize("rows", [[], [*prompts(3), *prompts(1)]])
def test_prompts_must_exist_and_be_unique(rows: list[Prompt]) -> None:
    with pytest.raises(DataError, match="no prompts" if not rows else "'p0' is not unique"):
        make_pool(rows, PoolConfig(), seed=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 0}, "version 0"),
        ({"version": 1}, "version 1, this qarl reads 2; resume with the qarl that wrote it"),
        ({"ids": []}, "4 prompt ids"),
        ({"ids": ["p0", "p1", "p2", "p3", "p3"]}, "damaged"),
        ({"columns": {"ticket": "AAAA"}}, "damaged"),
        ({"columns": {}}, "damaged"),
        ({"grown": [{"id": "p9"}]}, "damaged"),
        ({"gauges": {"no": 1}}, "damaged"),
        ({"archive": {"p0": {"row": {}, "step": 0}}}, "damaged"),
        ({"lineage": [["p0", "p1", 1.0], ["p1", "p0", 1.0]]}, "cycle"),
        ({"lineage": [["p0", "p9", 1.0]]}, "contradict"),
        ({"rng": [1, 2]}, "damaged"),
        ({"rng": [-1] * 625}, "damaged"),
        ({"grown": [{"id": "p9", "text": 5, "answer": "", "token_ids": []}]}, "is no prompt"),
        ({"grown": [{"id": "p9", "text": "", "answer": "", "token_ids": "abc"}]}, "is no prompt"),
        ({"cooling": None}, "damaged"),
        ({"cooling": ["p0"], "in_flight": ["p0"]}, "two states"),
        ({"cooling": ["p9"]}, "unknown"),
        ({"gauges": {"arrivals": "4"}}, "damaged .*arrivals is '4'"),
        ({"gauges": {"arrivals": 2**63}}, "damaged .*arrivals is 9"),
        ({"gauges": {"clock": math.inf}}, "damaged .*clock is inf"),
        ({"gauges": {"clock": -1.0}}, "damaged .*clock is -1"),
        ({"gauges": {"refresh_step": -2}}, "damaged .*refresh_step is -2"),
    ],
)
def test_foreign_states_are_refused_and_the_pool_stays(change: dict[str, Any], message: str) -> None:
    pool = Pool(prompts(4), PoolConfig(), seed=0)
    pool.draw(2, 0)
    before = pool.state_dict()
    with pytest.raises(CheckpointError, match=message):
        pool.load_state_dict({**through_json(pool), **change})
    assert pool.state_dict() == before


@pytest.mark.parametrize(
    ("column", "value"),
    [
        *(("ticket", v) for v in (math.nan, -0.1, 1.0)),
        *(("successes", v) for v in (math.nan, -0.1, 2.5)),
        *(("trials", v) for v in (math.nan, math.inf, 0.0)),
        *(("estimate", v) for v in (-0.1, 1.1, math.inf)),
        *(("alarm_base", v) for v in (math.nan, math.inf, -1.0)),
        ("arrival", -1),
        *(("visits", v) for v in (-1, 0)),
        ("last_step", -1),
    ],
)
def test_statistics_that_cannot_be_are_refused(column: str, value: float) -> None:
    """In the pool as in its archive; the prompt is named."""
    pool = Pool(prompts(4), PoolConfig(capacity=4, archive=ArchiveConfig(capacity=2)), seed=0)
    pool.observe([GroupResult(f"p{i}", (1.0, 0.0)) for i in range(4) if pool.draw(1, 0)], 0)
    pool.observe([GroupResult(f"p{i}", (1.0, 0.0)) for i in range(4)], 0)
    pool.add(Prompt("new", "", "", ()), "p1")
    state = through_json(pool)
    values = array(COLUMNS[column])
    values.frombytes(base64.b64decode(state["columns"][column]))
    values[2] = type(values[2])(value)
    damaged = {**state["columns"], column: base64.b64encode(values.tobytes()).decode()}
    with pytest.raises(CheckpointError, match=f"damaged .*'{state['ids'][2]}' has statistics that cannot be"):
        pool.load_state_dict({**state, "columns": damaged})
    row = {name: getattr(pool._stats, name)[2] for name in COLUMNS} | {column: value}
    with pytest.raises(CheckpointError, match=r"damaged .*'p9' has statistics"):
        parse({**state, "archive": {"p9": {"row": row, "step": 0}}}, [*prompts(4), Prompt("p9", "", "", ())])


@pytest.mark.parametrize(("column", "value"), [("arrival", 1.5), ("visits", 10**30), ("ticket", "0")])
def test_an_archived_prompt_has_values_of_the_columns_kinds(column: str, value: Any) -> None:
    """They go into the columns when the prompt comes back, many steps later."""
    pool = Pool(prompts(4), PoolConfig(capacity=4, archive=ArchiveConfig(capacity=2)), seed=0)
    row = {name: getattr(pool._stats, name)[2] for name in COLUMNS} | {"estimate": None, column: value}
    state = {**through_json(pool), "archive": {"p9": {"row": row, "step": 0}}}
    with pytest.raises(CheckpointError, match="damaged"):
        parse(state, [*prompts(4), Prompt("p9", "", "", ())])


@pytest.mark.parametrize("state", [[1], None, "{}", 3])
def test_what_is_no_state_is_refused(state: Any) -> None:
    with pytest.raises(CheckpointError, match="version None, this qarl reads 2"):
        Pool(prompts(4), PoolConfig(), seed=0).load_state_dict(state)


def test_state_of_another_data_set_is_refused() -> None:
    state = make_pool(prompts(5), PoolConfig(), seed=0).state_dict()
    with pytest.raises(CheckpointError, match="1 prompt ids are not in both the state and the task, first 'p4'"):
        make_pool(prompts(4), PoolConfig(), seed=0).load_state_dict(state)


def test_a_truncated_state_is_refused() -> None:
    pool = Pool(prompts(4), PoolConfig(), seed=0)
    whole = through_json(pool)
    for key in whole:
        with pytest.raises(CheckpointError):
            pool.load_state_dict({name: value for name, value in whole.items() if name != key})


def test_grown_prompts_come_back_whole() -> None:
    config = PoolConfig(capacity=3, archive=ArchiveConfig(capacity=2))
    pool, other = (Pool(prompts(2), config, seed=0) for _ in range(2))
    assert pool.add(Prompt("new", "2+2?", "4", (5, 6), level=7), parent_id="p0")
    other.load_state_dict(through_json(pool))
    assert Prompt("new", "2+2?", "4", (5, 6), level=7) in other.draw(3, 1)


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
    """The furthest prompts wait longest; beyond that the waiting would be infinite, and the state unreadable."""
    config = PoolConfig(strategy="prioritised", priority_exponent=8.0, cooldown_steps=0, prior_strength=1e-9)
    pool, other = (Pool(prompts(4), config, seed=0) for _ in range(2))
    for step in range(20):
        pool.observe([GroupResult(i, (1.0,)) for i in ids(pool.draw(4, step))], step)
    assert pool._strategy.clock < 2**53
    other.load_state_dict(through_json(pool))
    assert ids(other.draw(2, 20)) == ids(pool.draw(2, 20))


def test_the_augmented_share_counts_those_whose_parent_has_gone() -> None:
    pool = Pool(prompts(2), PoolConfig(capacity=3, cooldown_steps=0), seed=0)
    pool.observe([GroupResult(i, (0.0, 1.0)) for i in ids(pool.draw(2, 0))], 0)
    assert pool.add(Prompt("child", "", "", ()), "p0")
    pool.draw(3, 1)
    pool.observe([GroupResult("p0", (0.0,) * 8)], 1)
    assert pool.add(Prompt("stray", "", "", ()))  # p0, the furthest, leaves
    assert pool.metrics()["pool/augmented_share"] == pytest.approx(2 / 3)
    other = Pool(prompts(2), PoolConfig(capacity=3), seed=0)
    other.load_state_dict(through_json(pool))
    assert other.metrics()["pool/augmented_share"] == pytest.approx(2 / 3)


def test_easy_to_hard_goes_by_level_then_by_success() -> None:
    pool = Pool(prompts(6), PoolConfig(strategy="easy_to_hard", cooldown_steps=0), seed=0)
    drawn = pool.draw(6, 0)
    assert [prompt.level for prompt in drawn] == [0, 0, 1, 1, 2, 2]
    pool.observe([GroupResult(f"p{i}", (float(i >= 3),)) for i in range(6)], 0)
    assert ids(pool.draw(6, 1)) == ["p3", "p0", "p4", "p1", "p5", "p2"]


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

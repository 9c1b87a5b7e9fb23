"""The pool against a brute-force oracle that sorts everything at every draw."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from itertools import zip_longest
from statistics import fmean
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from qarl.prompts.pool import Pool
from qarl.prompts.strategies import LEAST_NEARNESS, Frontier, Median
from qarl.types import GroupResult, Prompt
from tests.support.pool import configs, ids, make_forest, prompts, through_json

RANDOMS = st.integers(0, 99).map(random.Random)


class PoolMachine(RuleBasedStateMachine):
    """`where`, `history` and `links` are the oracle, which sorts everything at every draw; the seeded random order
    (tickets) is read from the pool.

    `restored` is a pool loaded from `pool`'s state mid-run: from then on both get the same calls.
    """

    @initialize(data=st.data(), size=st.integers(1, 16), seed=st.integers(0, 3))
    def start(self, data: st.DataObject, size: int, seed: int) -> None:
        self.config, self.prompts, self.step = data.draw(configs(size)), prompts(size), 0
        self.pool, self.restored = self.make(seed), self.make(seed)
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
        return Pool(self.prompts, self.config, seed)

    # What the oracle knows

    def of_state(self, state: str) -> list[str]:
        return [prompt_id for prompt_id, at in self.where.items() if at == state]

    def column(self, name: str, prompt_id: str) -> float:
        record = self.pool._records.get(prompt_id) or self.pool._archive[prompt_id].record
        return float(getattr(record, name))

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

    def eviction_distance(self, prompt_id: str) -> float:
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
        assert ids(self.restored.draw(n, self.step)) == drawn
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
            self.restored.observe(results, self.step)
        accepted = 0
        for result in results:
            i = result.prompt_id
            if self.where.get(i) == "in_flight" and result.drawn_at in (None, self.drawn_at[i]):
                self.history[i].append((self.step, result.rewards))
                accepted += 1
                retire, measured = self.config.retire, self.measured(i)
                is_settled = measured >= retire.solved_above or measured <= retire.hopeless_below
                enough = 0 < retire.after_visits <= len(self.history[i])
                self.where[i] = "retired" if enough and is_settled else "cooling"
        self.counts["unknown_results"] += calls * len(results) - accepted

    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        chosen = data.draw(st.lists(st.sampled_from([*self.where, "unknown"]), max_size=6))
        self.pool.abort(chosen)
        self.restored.abort(chosen)
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
        assert self.restored.add(new, parent, difficulty) is entered
        self.counts["refused"] += not entered

    def enter(self, new: str) -> bool:
        """Whether `new` finds room, perhaps by evicting the farthest."""
        candidates = [i for i, at in self.where.items() if at != "in_flight"]
        victim = min(candidates, key=lambda i: (-self.eviction_distance(i), self.last(i), self.ticket(i)), default="")
        full = self.config.capacity is not None and len(self.where) == self.config.capacity
        if full and (not victim or self.eviction_distance(victim) <= self.eviction_distance(new)):
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
        """What was in flight is lost, the restored pool goes on from the saved state."""
        self.restored = self.make(seed=99)
        self.restored.load_state_dict(through_json(self.pool))
        in_flight = self.of_state("in_flight")
        self.pool.abort(in_flight)
        self.where.update(dict.fromkeys(in_flight, "eligible"))
        assert self.restored.state_dict() == self.pool.state_dict()
        assert self.restored.metrics() == self.pool.metrics()

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
        self.check_lists(low, rates.keys() - low)

    def check_lists(self, low: set[str], high: set[str]) -> None:
        """What the strategy and eviction would take first."""

        def check(listed: Any, expected: list[str] | set[str], *first: Callable[[str], float]) -> None:
            listed._check()  # sorted by the current values of its key
            order = sorted(expected, key=lambda i: (*(part(i) for part in first), self.last(i), self.ticket(i)))
            assert [record.prompt.id for record in listed] == order

        strategy, eligible = self.pool._strategy, self.of_state("eligible")
        if isinstance(strategy, Median):
            check(strategy._seen, [i for i in eligible if self.history[i]], self.measured)
        if isinstance(strategy, Frontier):
            check(strategy._turns, eligible)
            check(strategy.low, low, self.distance)
            check(strategy.high, high, self.distance)
        may_leave = [i for i, at in self.where.items() if at != "in_flight"] if self.config.capacity else []
        check(self.pool._evictable, may_leave, lambda i: -self.eviction_distance(i))

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
    max_examples=100, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)

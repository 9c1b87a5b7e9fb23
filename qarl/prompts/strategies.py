"""Which of the eligible prompts to draw. A strategy knows slots only; the pool knows what state they are in."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import zip_longest
from random import Random

from qarl.config.pool import PoolConfig
from qarl.prompts.heap import LazyHeap, sortable
from qarl.prompts.stats import Statistics
from qarl.types import Prompt

LEAST_NEARNESS = 0.02
"""`prioritised` draws a prompt at the far end of the success rates this much as often as one at the target."""


class Strategy:
    """Holds the eligible slots and picks from them; base of all. Changes of a slot's statistics come between
    `remove` and `add`.
    """

    def __init__(self, config: PoolConfig, stats: Statistics, prompts: Sequence[Prompt | None], rng: Random) -> None:
        self.config, self.stats, self.prompts, self.rng = config, stats, prompts, rng
        self.width = 0.0
        """Largest distance to the target among the frontier prompts of the last draw."""
        self.clock = 0.0
        """Time of the `prioritised` strategy; saved with the pool."""

    def add(self, slots: Sequence[int]) -> None:
        raise NotImplementedError

    def remove(self, slot: int) -> None:
        raise NotImplementedError

    def select(self, n: int, step: int) -> list[int]:
        """Remove and return min(n, eligible) slots."""
        raise NotImplementedError

    def far(self, slot: int) -> float:
        """What eviction goes by: the largest goes first."""
        return self.stats.distance(slot)


class Queue(Strategy):
    """A strategy that gives every slot its turn and draws the first."""

    priority: str
    """What kind of numbers a turn is, as LazyHeap takes it."""

    def __init__(self, config: PoolConfig, stats: Statistics, prompts: Sequence[Prompt | None], rng: Random) -> None:
        super().__init__(config, stats, prompts, rng)
        self._queue = LazyHeap(self.priority)

    def turn(self, slot: int) -> tuple[float, ...]:
        raise NotImplementedError

    def add(self, slots: Sequence[int]) -> None:
        self._queue.push([(*self.turn(slot), slot) for slot in slots])

    def remove(self, slot: int) -> None:
        self._queue.remove(slot)

    def select(self, n: int, step: int) -> list[int]:
        return self._queue.take(n)


class Uniform(Queue):
    """Every prompt once in random order, then every prompt again in a new order."""

    priority = "Qd"

    def turn(self, slot: int) -> tuple[float, ...]:
        return self.stats.visits[slot], self.stats.ticket[slot]


class EasyToHard(Queue):
    """Passes over all prompts, each by the data's level and then from the often solved to the rarely solved."""

    priority = "QQQd"

    def turn(self, slot: int) -> tuple[float, ...]:
        prompt, stats = self.prompts[slot], self.stats
        assert prompt is not None
        return stats.visits[slot], sortable(prompt.level), sortable(-stats.rate(slot)), stats.ticket[slot]


class Prioritised(Queue):
    """Draws without replacement with probability proportional to a weight: nearness to the target, to a power.

    Every slot has an alarm that rings an exponentially distributed time after its last observation, at the rate of its
    weight; a draw takes the next that ring and moves the clock there. Since such waiting times have no memory, that is
    weighted sampling, at O(log N) a prompt.
    """

    priority = "dd"

    def weight(self, slot: int) -> float:
        reach = max(self.config.target, 1.0 - self.config.target)
        nearness = 1.0 - self.stats.distance(slot) / reach
        return max(nearness, LEAST_NEARNESS) ** self.config.priority_exponent

    def turn(self, slot: int) -> tuple[float, ...]:
        waiting = -math.log1p(-self.stats.ticket[slot]) / self.weight(slot)
        return self.stats.alarm_base[slot] + waiting, self.stats.ticket[slot]

    def select(self, n: int, step: int) -> list[int]:
        picked = super().select(n, step)
        if picked:
            self.clock = max(self.clock, self.turn(picked[-1])[0])
        return picked


class Frontier(Strategy):
    """A share of unseen and stale prompts, then those nearest to the target success rate.

    The low heap holds success rates up to the target, the high heap those above, each with the nearest on top: m
    prompts are picked at random from the 2m met when walking outwards, low and high by turns.
    """

    def __init__(self, config: PoolConfig, stats: Statistics, prompts: Sequence[Prompt | None], rng: Random) -> None:
        super().__init__(config, stats, prompts, rng)
        self._turns = LazyHeap("dd")  # all: unseen at random, then longest unvisited first
        self.low, self.high = LazyHeap("dQd"), LazyHeap("dQd")

    def add(self, slots: Sequence[int]) -> None:
        stats, target = self.stats, self.stats.target
        turns, low, high = [], [], []
        for slot in slots:
            since, ticket, rate = stats.last_step[slot] + 1, stats.ticket[slot], stats.rates[slot]
            turns.append((since, ticket, slot))
            if not stats.known(slot):
                continue
            if rate <= target:
                low.append((target - rate, since, ticket, slot))
            else:
                high.append((rate - target, since, ticket, slot))
        self._turns.push(turns)
        self.low.push(low)
        self.high.push(high)

    def remove(self, slot: int) -> None:
        for heap in (self._turns, self.low, self.high):
            heap.discard([slot])

    def select(self, n: int, step: int) -> list[int]:
        picked = self._explore(round(self.config.exploration * n), step - self.config.stale_after_steps)
        self.width = 0.0
        picked += self._pick_near(n - len(picked), self.config.reach)
        picked += self._explore(n - len(picked), latest=-1)
        if len(picked) < n:
            picked += self._pick_near(n - len(picked), reach=1.0)
        return picked

    def _explore(self, quota: int, latest: int) -> list[int]:
        """Up to `quota` of the unseen and then of those last visited at step `latest` or before."""
        picked = self._turns.take(quota, most=max(latest, -1) + 1)
        self.low.discard(picked)
        self.high.discard(picked)
        return picked

    def _pick_near(self, m: int, reach: float) -> list[int]:
        picked = pick_outwards(self.low, self.high, m, self.rng, reach)
        self._turns.discard(picked)
        rates, target = self.stats.rates, self.stats.target
        self.width = max([self.width, *[abs(rates[slot] - target) for slot in picked]])
        return picked


class Median(Strategy):
    """HeaPA as published, for comparison: unseen prompts in the order of the data, then those nearest to the median
    of the last visits' rewards. Evicts the hardest first.
    """

    def __init__(self, config: PoolConfig, stats: Statistics, prompts: Sequence[Prompt | None], rng: Random) -> None:
        super().__init__(config, stats, prompts, rng)
        self._unseen = LazyHeap("Q")
        self.low, self.high = LazyHeap("QQQ"), LazyHeap("QQQ")  # the lower half, rounded up, and the upper half

    def add(self, slots: Sequence[int]) -> None:
        for slot in slots:
            if not self.stats.visits[slot]:
                self._unseen.push([(self.stats.arrival[slot], slot)])
            else:
                self._push(self.low, slot)
                self._push(self.high, self.low.pop())
                self._balance()

    def remove(self, slot: int) -> None:
        for heap in (self._unseen, self.low, self.high):
            heap.discard([slot])
        self._balance()

    def select(self, n: int, step: int) -> list[int]:
        unseen = self._unseen.take(n)
        picked = pick_outwards(self.low, self.high, n - len(unseen), self.rng)
        self._balance()
        self.width = max(map(self.stats.distance, picked), default=0.0)
        return unseen + picked

    def far(self, slot: int) -> float:
        return 1.0 - self.stats.measured(slot) if self.stats.visits[slot] else 0.0

    def _push(self, heap: LazyHeap, slot: int) -> None:
        sign = 1 if heap is self.high else -1  # the top is the one nearest to the median
        order = (self.stats.measured(slot), self.stats.last_step[slot], self.stats.ticket[slot])
        heap.push([(*(sortable(sign * part) for part in order), slot)])

    def _balance(self) -> None:
        while len(self.high) > len(self.low):
            self._push(self.low, self.high.pop())
        while len(self.low) > len(self.high) + 1:
            self._push(self.high, self.low.pop())


def pick_outwards(low: LazyHeap, high: LazyHeap, m: int, rng: Random, reach: float = math.inf) -> list[int]:
    """Remove and return up to `m` slots, at random of the first 2m, by turns, low first, whose priority begins with at
    most `reach`.
    """
    above = high.nearest(m, reach)
    below = low.nearest(2 * m - len(above), reach)  # where one side has too few, the other fills up
    above = high.nearest(2 * m - len(below), reach)
    window = [slot for pair in zip_longest(below, above) for slot in pair if slot is not None]
    picked = rng.sample(window, min(m, len(window)))
    low.discard(picked)
    high.discard(picked)
    return picked


STRATEGIES: dict[str, type[Strategy]] = {
    "frontier": Frontier,
    "uniform": Uniform,
    "median": Median,
    "prioritised": Prioritised,
    "easy_to_hard": EasyToHard,
}

"""Which of the eligible prompts to draw."""

import math
from collections.abc import Iterable, Sequence
from itertools import islice, takewhile, zip_longest
from random import Random

from sortedcontainers import SortedKeyList

from qarl.config.pool import PoolConfig
from qarl.prompts.stats import Record, Statistics

LEAST_NEARNESS = 0.02
"""`prioritised` draws the prompts farthest from the target this much as often as one at the target."""


class Strategy:
    """Holds the eligible records in sorted lists and picks from them; base of all."""

    def __init__(self, config: PoolConfig, stats: Statistics, rng: Random) -> None:
        self.config, self.stats, self.rng = config, stats, rng
        self.width = 0.0
        """Largest distance to the target among the frontier prompts of the last draw."""
        self.clock = 0.0
        """Time of the `prioritised` strategy; saved with the pool."""

    def add(self, records: Sequence[Record]) -> None:
        raise NotImplementedError

    def remove(self, record: Record) -> None:
        raise NotImplementedError

    def choose(self, n: int, step: int) -> list[Record]:
        """Remove and return min(n, eligible) records."""
        raise NotImplementedError

    def eviction_distance(self, record: Record) -> float:
        """The pool evicts the prompt for which this is largest."""
        return self.stats.distance(record)

    def take(self, records: Iterable[Record]) -> list[Record]:
        """Remove and return `records`."""
        taken = list(records)
        for record in taken:
            self.remove(record)
        return taken


class Queue(Strategy):
    """A strategy that sorts all records by `turn` and draws the first."""

    def __init__(self, config: PoolConfig, stats: Statistics, rng: Random) -> None:
        super().__init__(config, stats, rng)
        self._queue = SortedKeyList(key=self.turn)

    def turn(self, record: Record) -> tuple[float, ...]:
        raise NotImplementedError

    def add(self, records: Sequence[Record]) -> None:
        self._queue.update(records)

    def remove(self, record: Record) -> None:
        self._queue.remove(record)

    def choose(self, n: int, step: int) -> list[Record]:
        return self.take(islice(self._queue, n))


class Uniform(Queue):
    """Every prompt once in random order, then every prompt again in a new order."""

    def turn(self, record: Record) -> tuple[float, ...]:
        return record.visits, record.ticket, record.arrival


class EasyToHard(Queue):
    """Passes over all prompts, each by the data's level and then from the often solved to the rarely solved."""

    def turn(self, record: Record) -> tuple[float, ...]:
        return record.visits, record.prompt.level, -record.rate, record.ticket, record.arrival


class Prioritised(Queue):
    """Draws without replacement with probability proportional to a weight: nearness to the target, to a power.

    Every prompt has an alarm that rings an exponentially distributed time after its last observation, at the rate of
    its weight; a draw takes the next that ring and moves the clock there. Since such waiting times have no memory,
    that is weighted sampling, at O(log N) a prompt.
    """

    def weight(self, record: Record) -> float:
        largest_distance = max(self.config.target, 1.0 - self.config.target)
        nearness = 1.0 - self.stats.distance(record) / largest_distance
        return max(nearness, LEAST_NEARNESS) ** self.config.priority_exponent

    def turn(self, record: Record) -> tuple[float, ...]:
        waiting = -math.log1p(-record.ticket) / self.weight(record)
        return record.alarm_base + waiting, record.ticket, record.arrival

    def choose(self, n: int, step: int) -> list[Record]:
        picked = super().choose(n, step)
        if picked:
            self.clock = max(self.clock, self.turn(picked[-1])[0])
        return picked


class Frontier(Strategy):
    """A share of unseen and stale prompts, then those nearest to the target success rate.

    `low` holds success rates up to the target, `high` those above, each with the nearest first.
    """

    def __init__(self, config: PoolConfig, stats: Statistics, rng: Random) -> None:
        super().__init__(config, stats, rng)
        self._turns = SortedKeyList(key=longest_unvisited_first)  # all eligible records
        self.low, self.high = SortedKeyList(key=self._nearest_first), SortedKeyList(key=self._nearest_first)

    def add(self, records: Sequence[Record]) -> None:
        self._turns.update(records)
        known = [record for record in records if record.known]
        self.low.update([record for record in known if record.rate <= self.stats.target])
        self.high.update([record for record in known if record.rate > self.stats.target])

    def remove(self, record: Record) -> None:
        self._turns.remove(record)
        if record.known:
            (self.low if record.rate <= self.stats.target else self.high).remove(record)

    def choose(self, n: int, step: int) -> list[Record]:
        picked = self._explore(round(self.config.exploration * n), step - self.config.stale_after_steps)
        self.width = 0.0
        picked += self._pick_near(n - len(picked), self.config.reach)
        picked += self._explore(n - len(picked), latest=-1)
        if len(picked) < n:
            picked += self._pick_near(n - len(picked), reach=1.0)
        return picked

    def _nearest_first(self, record: Record) -> tuple[float, ...]:
        return abs(record.rate - self.stats.target), record.last_step, record.ticket, record.arrival

    def _explore(self, quota: int, latest: int) -> list[Record]:
        """Up to `quota` of the unseen and then of those last visited at step `latest` or before."""
        first = islice(self._turns, quota)
        return self.take(takewhile(lambda record: record.last_step <= max(latest, -1), first))

    def _pick_near(self, m: int, reach: float) -> list[Record]:
        distance = self.stats.distance
        low, high = (takewhile(lambda record: distance(record) <= reach, side) for side in (self.low, self.high))
        picked = self.take(sample_outwards(low, high, m, self.rng))
        self.width = max([self.width, *map(distance, picked)])
        return picked


class Median(Strategy):
    """HeaPA as published, for comparison: unseen prompts in the order of the data, then those nearest to the median
    of the last visits' rewards. Evicts the hardest first.
    """

    def __init__(self, config: PoolConfig, stats: Statistics, rng: Random) -> None:
        super().__init__(config, stats, rng)
        self._unseen = SortedKeyList(key=lambda record: record.arrival)
        self._seen = SortedKeyList(key=lambda record: (record.measured, *longest_unvisited_first(record)))

    def add(self, records: Sequence[Record]) -> None:
        self._unseen.update([record for record in records if not record.visits])
        self._seen.update([record for record in records if record.visits])

    def remove(self, record: Record) -> None:
        (self._seen if record.visits else self._unseen).remove(record)

    def choose(self, n: int, step: int) -> list[Record]:
        unseen = self.take(islice(self._unseen, n))
        half = (len(self._seen) + 1) // 2
        low, high = self._seen.islice(0, half, reverse=True), self._seen.islice(half)
        picked = self.take(sample_outwards(low, high, n - len(unseen), self.rng))
        self.width = max(map(self.stats.distance, picked), default=0.0)
        return unseen + picked

    def eviction_distance(self, record: Record) -> float:
        return 1.0 - record.measured if record.visits else 0.0


def longest_unvisited_first(record: Record) -> tuple[float, ...]:
    """Sort key: unseen records in random order, then seen ones by their last visit."""
    return record.last_step, record.ticket, record.arrival


def sample_outwards(low: Iterable[Record], high: Iterable[Record], m: int, rng: Random) -> list[Record]:
    """Up to `m` records at random of the first 2m met when walking along `low` and `high` by turns, low first."""
    met = (record for pair in zip_longest(low, high) for record in pair if record is not None)
    window = list(islice(met, 2 * m))
    return rng.sample(window, min(m, len(window)))


STRATEGIES: dict[str, type[Strategy]] = {
    "frontier": Frontier,
    "uniform": Uniform,
    "median": Median,
    "prioritised": Prioritised,
    "easy_to_hard": EasyToHard,
}

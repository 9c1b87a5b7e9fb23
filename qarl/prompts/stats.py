"""What the pool knows of each prompt, and totals over all prompts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

from qarl.config.pool import PoolConfig
from qarl.errors import DataError
from qarl.types import GroupResult, Prompt

BINS = 10
RATE_UNITS = 2.0**40
"""Success rates are summed in integer multiples of 1 / RATE_UNITS: the sum is exact, hence equal after a resume."""

LAST_STEP = 2**53
"""The largest step and count that a state may hold."""


class Status(IntEnum):
    """Where a prompt is. The first three are eligible for a draw."""

    COLD = 0
    LOW = 1
    HIGH = 2
    IN_FLIGHT = 3
    COOLING = 4
    RETIRED = 5
    ABSENT = 6  # not in the pool: new, archived or rejected


@dataclass(slots=True, eq=False)
class Record:
    """One prompt and what is known of it.

    Sorted lists order records by these fields: take a record out of every list before you change one.
    """

    prompt: Prompt
    ticket: float  # random in [0, 1), new at each observation: orders unseen prompts and breaks ties among seen ones
    successes: float = 0.0  # decayed sum of rewards
    trials: float = 0.0  # decayed number of responses
    estimate: float = math.nan  # success rate inferred from relatives; NaN when there is none
    alarm_base: float = 0.0  # clock of the `prioritised` strategy at the last observation
    arrival: int = 0  # rank by entry into the pool; unique, hence the last tie-breaker
    visits: int = 0  # observed draws; 0 means that nothing was measured
    last_step: int = -1  # step of the last observation, -1 before the first
    rate: float = 0.0  # success rate; follows from the above and the config
    status: Status = Status.ABSENT
    drawn_at: int = -1  # step of the last draw

    @property
    def known(self) -> bool:
        """Whether there is a measurement or an estimate."""
        return self.visits > 0 or not math.isnan(self.estimate)

    @property
    def measured(self) -> float:
        """Mean reward, recent visits weighing more; NaN when nothing was measured."""
        return self.successes / self.trials if self.visits else math.nan


def check_counts(**counts: int) -> None:
    """Raises DataError when a count is negative or above LAST_STEP: no later state could be read back."""
    for name, count in counts.items():
        if not 0 <= count <= LAST_STEP:
            raise DataError(f"{name} is {count}", where="prompt pool", hint=f"it counts from 0 to {LAST_STEP} at most")


def is_flat(result: GroupResult) -> bool:
    """Whether all rewards are equal. Raises DataError when there are none, or one is outside [0, 1]."""
    rewards = result.rewards
    least, most = (min(rewards), max(rewards)) if rewards else (math.nan, math.nan)
    if least >= 0.0 and most <= 1.0 and not math.isnan(sum(rewards)):  # the sum is NaN when one of them is
        return least == most
    what = f"rewards {list(rewards)} are not one or more numbers in [0, 1]"
    raise DataError(what, where=f"prompt '{result.prompt_id}'", hint="check the verifier")


class Statistics:
    """Computes success rates, and keeps totals over the records that were entered.

    A measurement is decayed rewards over decayed trials. An estimate replaces the prior; it never changes the
    measurement.
    """

    def __init__(self, config: PoolConfig) -> None:
        self.target = config.target
        # As HeaPA published it, the difficulty is the last visit's mean.
        self._decay = 0.0 if config.strategy == "median" else config.decay
        self._prior_strength = config.prior_strength
        self._estimate_strength = config.lineage.estimate_strength
        self.histogram = [0] * BINS
        """Seen prompts by success rate."""
        self._rate_sum = 0  # over seen prompts, in units of 1 / RATE_UNITS
        self.unseen_estimated = 0

    def update_rate(self, record: Record) -> None:
        """Set the success rate in [0, 1]: the mean of the Beta posterior."""
        prior, strength = self._prior(record)
        record.rate = (record.successes + strength * prior) / (record.trials + strength)

    def enter(self, record: Record) -> None:
        """Add `record` to the totals."""
        self.update_rate(record)
        self._count(record, 1)

    def leave(self, record: Record) -> None:
        self._count(record, -1)

    def learn(self, record: Record, rewards: Sequence[float], step: int, ticket: float) -> None:
        """Add one visit's rewards to an entered record."""
        self.leave(record)
        record.successes = self._decay * record.successes + sum(rewards)
        record.trials = self._decay * record.trials + len(rewards)
        record.visits += 1
        record.last_step, record.ticket = step, ticket
        self.enter(record)

    def set_estimate(self, record: Record, estimate: float) -> None:
        self.leave(record)
        record.estimate = estimate
        self.enter(record)

    def distance(self, record: Record) -> float:
        """Of the success rate to the target."""
        return abs(record.rate - self.target)

    def spread(self, record: Record) -> float:
        """Expected standard deviation of a reward: E sqrt(p (1 - p)) under the Beta posterior of the success rate p."""
        prior, strength = self._prior(record)
        a = record.successes + strength * prior
        b = record.trials - record.successes + strength * (1.0 - prior)
        if min(a, b) <= 0.0:
            return 0.0  # the posterior is a point mass at 0 or 1
        beta = math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
        return math.exp(math.lgamma(a + 0.5) + math.lgamma(b + 0.5) - math.lgamma(a + b + 1.0) - beta)

    def own_rate(self, record: Record) -> float:
        """Success rate from the measurement and the plain prior; of an unseen prompt, its rate."""
        if not record.visits:
            return record.rate
        prior = self._prior_strength
        return (record.successes + prior * self.target) / (record.trials + prior)

    def seen(self) -> int:
        return sum(self.histogram)

    def rate_mean(self) -> float:
        """Mean success rate over seen prompts; the prior mean while there are none."""
        return self._rate_sum / RATE_UNITS / seen if (seen := self.seen()) else self.target

    def _prior(self, record: Record) -> tuple[float, float]:
        """Mean and pseudo-trials."""
        if math.isnan(record.estimate):
            return self.target, self._prior_strength
        return record.estimate, self._estimate_strength

    def _count(self, record: Record, sign: int) -> None:
        if record.visits:
            rate = record.rate
            self.histogram[int(rate * BINS) if rate < 1.0 else BINS - 1] += sign
            self._rate_sum += sign * int(rate * RATE_UNITS)
        elif record.known:
            self.unseen_estimated += sign

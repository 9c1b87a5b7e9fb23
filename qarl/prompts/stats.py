"""What is known of each prompt, in columns: a million prompts would be too many objects."""

from __future__ import annotations

import base64
import math
from array import array
from collections.abc import Mapping, Sequence
from typing import Any

from qarl.config.pool import PoolConfig
from qarl.errors import DataError
from qarl.types import GroupResult

COLUMNS = {
    "ticket": "d",  # random, new at each observation: orders the unseen and breaks ties among the seen
    "successes": "d",  # decayed sum of rewards
    "trials": "d",  # decayed number of responses
    "estimate": "d",  # success rate inferred from relatives; NaN when there is none
    "alarm_base": "d",  # clock of the `prioritised` strategy at the last observation
    "arrival": "q",  # rank by entry into the pool
    "visits": "q",  # observed draws; 0 means that nothing was measured
    "last_step": "q",  # step of the last observation, -1 before the first
}
NEW = {
    "arrival": 0,
    "successes": 0.0,
    "trials": 0.0,
    "estimate": math.nan,
    "alarm_base": 0.0,
    "visits": 0,
    "last_step": -1,
}
BINS = 10
RATE_UNITS = 2.0**40
"""Success rates are added up in whole numbers of the inverse of this: exactly, hence equal after a resume."""

LAST_STEP = 2**53
"""Priorities hold steps as floats, which are exact up to here."""


def check_counts(**counts: int) -> None:
    """Raises DataError when one of them is negative or beyond LAST_STEP: no later state could be read back."""
    for name, count in counts.items():
        if not 0 <= count <= LAST_STEP:
            raise DataError(f"{name} is {count}", where="prompt pool", mend=f"it counts from 0 to {LAST_STEP} at most")


def is_flat(result: GroupResult) -> bool:
    """Whether all rewards are equal. Raises DataError when there are none, or one is outside [0, 1]."""
    rewards = result.rewards
    least, most = (min(rewards), max(rewards)) if rewards else (math.nan, math.nan)
    if least >= 0.0 and most <= 1.0 and not math.isnan(sum(rewards)):  # the sum is NaN when one of them is
        return least == most
    what = f"rewards {list(rewards)} are not one or more numbers in [0, 1]"
    raise DataError(what, where=f"prompt '{result.prompt_id}'", mend="check the verifier")


class Statistics:
    """Success statistics by slot. A measurement is decayed rewards over decayed trials; an estimate stands in for the
    prior and is never mixed into the measurement.
    """

    def __init__(self, config: PoolConfig) -> None:
        self.target = config.target
        # As HeaPA published it, the last visit's mean is the difficulty.
        self.decay = 0.0 if config.strategy == "median" else config.decay
        self._prior_strength = config.prior_strength
        self._estimate_strength = config.lineage.estimate_strength
        self.ticket: array[float] = array("d")
        self.successes: array[float] = array("d")
        self.trials: array[float] = array("d")
        self.estimate: array[float] = array("d")
        self.alarm_base: array[float] = array("d")
        self.arrival: array[int] = array("q")
        self.visits: array[int] = array("q")
        self.last_step: array[int] = array("q")
        self.rates: array[float] = array("d")
        """Success rates; they follow from the columns and the config, and are not saved."""
        self.histogram = [0] * BINS
        """Seen prompts by success rate."""
        self._rate_sum = 0  # times RATE_UNITS
        self.unseen_estimated = 0

    def __len__(self) -> int:
        return len(self.ticket)

    def fill(self, tickets: Sequence[float]) -> None:
        """Fresh prompts, one for each ticket, that arrived in this order; there were none before."""
        columns = {name: array(kind, [NEW.get(name, 0)]) * len(tickets) for name, kind in COLUMNS.items()}
        self.set_columns({**columns, "ticket": array("d", tickets), "arrival": array("q", range(len(tickets)))})

    def put(self, slot: int, ticket: float, **known: float) -> None:
        """Set a slot (the next new one, or a freed one) to `known`, and to a fresh prompt's values elsewhere."""
        if slot == len(self):
            self.rates.append(0.0)
        for name, value in {"ticket": ticket, **NEW, **known}.items():
            column = getattr(self, name)
            if slot == len(column):
                column.append(value)
            else:
                column[slot] = value
        self._enter(slot)

    def columns(self, slots: Sequence[int]) -> dict[str, str]:
        """The columns at `slots`: 8 bytes a value in this machine's order, in base64, which JSON writes fast."""
        kept = {name: array(kind, map(getattr(self, name).__getitem__, slots)) for name, kind in COLUMNS.items()}
        return {name: base64.b64encode(column.tobytes()).decode() for name, column in kept.items()}

    def set_columns(self, columns: Mapping[str, array[Any]]) -> None:
        """Take over whole columns, all of one length."""
        for name in COLUMNS:
            setattr(self, name, columns[name])
        self.rates = array("d", [0.0]) * len(self)
        for slot in range(len(self)):
            self._enter(slot)

    def clear(self, slot: int) -> None:
        """The prompt at `slot` is gone."""
        self._count(slot, -1)
        self.visits[slot], self.estimate[slot] = 0, math.nan

    def row(self, slot: int) -> dict[str, float]:
        """Everything known of one prompt, as `put` takes it."""
        return {name: getattr(self, name)[slot] for name in COLUMNS}

    def learn(self, slot: int, rewards: Sequence[float], step: int, ticket: float) -> None:
        """Add one visit's rewards."""
        self._count(slot, -1)
        self.successes[slot] = self.decay * self.successes[slot] + sum(rewards)
        self.trials[slot] = self.decay * self.trials[slot] + len(rewards)
        self.visits[slot] += 1
        self.last_step[slot] = step
        self.ticket[slot] = ticket
        self._enter(slot)

    def set_estimate(self, slot: int, estimate: float) -> None:
        self._count(slot, -1)
        self.estimate[slot] = estimate
        self._enter(slot)

    def rate(self, slot: int) -> float:
        """Success rate in [0, 1]: mean of the Beta posterior whose prior is the estimate, or else the target."""
        return self.rates[slot]

    def spread(self, slot: int) -> float:
        """Standard deviation expected of a reward: E sqrt(p (1 - p)) under the Beta posterior of the success rate p."""
        estimate, strength = self._prior(slot)
        a = self.successes[slot] + strength * estimate
        b = self.trials[slot] - self.successes[slot] + strength * (1.0 - estimate)
        if min(a, b) <= 0.0:
            return 0.0  # all of the posterior lies on one end
        beta = math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
        return math.exp(math.lgamma(a + 0.5) + math.lgamma(b + 0.5) - math.lgamma(a + b + 1.0) - beta)

    def own_rate(self, slot: int) -> float:
        """What the prompt says for itself: its measurement under the plain prior; unseen, what is expected of it."""
        if not self.visits[slot]:
            return self.rate(slot)
        prior = self._prior_strength
        return (self.successes[slot] + prior * self.target) / (self.trials[slot] + prior)

    def measured(self, slot: int) -> float:
        """Mean reward, recent visits weighing more; NaN when nothing was measured."""
        return self.successes[slot] / self.trials[slot] if self.visits[slot] else math.nan

    def distance(self, slot: int) -> float:
        return abs(self.rates[slot] - self.target)

    def known(self, slot: int) -> bool:
        """Whether there is a measurement or an estimate."""
        return self.visits[slot] > 0 or self.estimate[slot] == self.estimate[slot]

    def seen(self) -> int:
        return sum(self.histogram)

    def rate_mean(self) -> float:
        """Mean success rate over seen prompts; the prior mean while there are none."""
        return self._rate_sum / RATE_UNITS / seen if (seen := self.seen()) else self.target

    def _prior(self, slot: int) -> tuple[float, float]:
        """Its mean and its pseudo-trials."""
        estimate = self.estimate[slot]
        if estimate != estimate:  # NaN
            return self.target, self._prior_strength
        return estimate, self._estimate_strength

    def _enter(self, slot: int) -> None:
        """The columns at `slot` are new: work out the success rate and count it."""
        estimate, strength = self._prior(slot)
        self.rates[slot] = (self.successes[slot] + strength * estimate) / (self.trials[slot] + strength)
        self._count(slot, 1)

    def _count(self, slot: int, sign: int) -> None:
        if self.visits[slot]:
            rate = self.rates[slot]
            self.histogram[int(rate * BINS) if rate < 1.0 else BINS - 1] += sign
            self._rate_sum += sign * int(rate * RATE_UNITS)
        elif self.estimate[slot] == self.estimate[slot]:
            self.unseen_estimated += sign

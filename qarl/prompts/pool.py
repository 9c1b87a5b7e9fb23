"""The prompt pool: rollouts go to the prompts that the policy solves about as often as the target says.

After HeaPA (github.com/horizon-rl/HeaPA), with two heaps that meet at a target success rate instead of the median.
Every prompt is in exactly one state:

    cold (unseen) | low (success rate <= target) | high (> target)  --draw-->  in flight  --observe-->  cooling
         ^------------------ abort ------------------------------------'                                   |
                            ^------------------------ after cooldown_steps --------------------------------'
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from random import Random
from statistics import fmean
from typing import Any

from qarl.config import PoolConfig
from qarl.errors import CheckpointError, DataError
from qarl.prompts.heap import IndexedHeap, Priority
from qarl.protocols import PromptPool
from qarl.types import GroupResult, Prompt

STATE_VERSION = 1


@dataclass
class _Record:
    """What is known of one prompt. `ticket` is random: it orders the unseen and breaks ties among the seen."""

    ticket: float
    successes: float = 0.0  # decayed sum of rewards
    trials: float = 0.0  # decayed number of responses
    visits: int = 0  # observed draws
    last_step: int = -1  # step of the last observation


class FrontierPool:
    """Draws the prompts nearest to the target success rate, and a share of unseen and stale ones.

    All draws depend on `seed` and the calls alone; draw k costs O(k log N), observe and abort O(log N) a prompt.
    Raises DataError when there are no prompts or two have the same id.
    """

    def __init__(self, prompts: Sequence[Prompt], config: PoolConfig, seed: int) -> None:
        if not prompts:
            raise DataError("no prompts", where="prompt pool", mend="check the training data")
        counts = Counter(prompt.id for prompt in prompts)
        twice = [prompt_id for prompt_id, count in counts.items() if count > 1]
        if twice:
            raise DataError(f"prompt id '{twice[0]}' is not unique", "prompt pool", mend="give each row its own id")
        self._prompts = {prompt.id: prompt for prompt in prompts}
        self._config = config
        self._rng = Random(seed)
        self._records = {prompt_id: _Record(self._rng.random()) for prompt_id in self._prompts}
        self._unknown_results = 0
        self._zero_variance_share = 0.0
        self._frontier_width = 0.0
        self._fill_heaps(cooling=())

    def draw(self, n: int, step: int) -> list[Prompt]:
        """min(n, eligible) distinct prompts, now in flight; never one that is in flight or cooling.

        Fewer than `n`, possibly none, means that the rest of the pool is in flight or cooling.
        """
        while self._cooling and self._record(self._cooling.peek()).last_step + self._config.cooldown_steps < step:
            self._make_eligible(self._cooling.pop())
        return [self._prompts[prompt_id] for prompt_id in self._select(n, step)]

    def observe(self, results: Sequence[GroupResult], step: int) -> None:
        """Record the rewards of prompts in flight, which then cool: eligible at a step > `step` + cooldown_steps.

        A result of a prompt that is not in flight (late, duplicate, unknown) changes nothing and is counted.
        Raises DataError, before anything is recorded, when rewards are missing or outside [0, 1].
        """
        for result in results:
            if not result.rewards or not all(0.0 <= reward <= 1.0 for reward in result.rewards):  # NaN fails too
                what = f"rewards {list(result.rewards)} are not one or more numbers in [0, 1]"
                raise DataError(what, where=f"prompt '{result.prompt_id}'", mend="check the verifier")
        flat_groups = []
        for result in results:
            if result.prompt_id not in self._in_flight:
                self._unknown_results += 1
                continue
            self._in_flight.remove(result.prompt_id)
            self._learn(self._record(result.prompt_id), result.rewards, step)
            self._cool(result.prompt_id)
            flat_groups.append(min(result.rewards) == max(result.rewards))
        if flat_groups:
            self._zero_variance_share = fmean(flat_groups)

    def abort(self, prompt_ids: Sequence[str]) -> None:
        """Return prompts in flight, unobserved, to the state that they were drawn from; others are left alone."""
        for prompt_id in self._in_flight.intersection(prompt_ids):
            self._in_flight.remove(prompt_id)
            self._make_eligible(prompt_id)

    def state_dict(self) -> dict[str, Any]:
        """Everything that later draws depend on, ready for JSON, O(N)."""
        return {
            "version": STATE_VERSION,
            "rng": list(self._rng.getstate()[1]),
            "records": {prompt_id: dict(vars(record)) for prompt_id, record in self._records.items()},
            "in_flight": sorted(self._in_flight),
            "cooling": sorted(prompt_id for prompt_id in self._records if prompt_id in self._cooling),
            "unknown_results": self._unknown_results,
            "zero_variance_share": self._zero_variance_share,
            "frontier_width": self._frontier_width,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`: the draws to come are those of the pool that wrote it.

        Prompts that were in flight return as if aborted, since their rollouts died with the process. Estimates are
        kept when the config (target, cool-down, strategy) has changed.

        Raises:
            CheckpointError: another version, other prompt ids, or incomplete; the pool is then as before.
        """
        where = "prompt pool state"
        if state.get("version") != STATE_VERSION:
            raise CheckpointError(f"version {state.get('version')}, this qarl reads {STATE_VERSION}", where)
        try:
            records = {prompt_id: _Record(**fields) for prompt_id, fields in dict(state["records"]).items()}
            in_flight, cooling = set(state["in_flight"]), set(state["cooling"])
            gauges = int(state["unknown_results"]), float(state["zero_variance_share"]), float(state["frontier_width"])
            rng = Random()
            rng.setstate((Random.VERSION, tuple(state["rng"]), None))
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"incomplete or damaged ({error!r})", where) from error
        foreign = sorted(records.keys() ^ self._records.keys())
        if foreign:
            what = f"{len(foreign)} prompt ids are not in both the state and the task, first '{foreign[0]}'"
            raise CheckpointError(what, where, mend="resume with the task data that the run began with")
        if in_flight & cooling or not in_flight | cooling <= records.keys():
            raise CheckpointError("a prompt is unknown or in two states", where)
        self._rng, self._records = rng, {prompt_id: records[prompt_id] for prompt_id in self._prompts}
        self._unknown_results, self._zero_variance_share, self._frontier_width = gauges
        self._fill_heaps(cooling)

    def metrics(self) -> dict[str, float]:
        """Counts by state as of the last draw or observe, and how well the draws aim, O(N).

        `success_mean` is over seen prompts (the prior mean while there are none); `frontier_width` is the largest
        distance to the target among the frontier prompts of the last draw; `zero_variance_share` is the share of
        groups with equal rewards in the last observe; `unknown_results` counts since the start of the run.
        """
        seen = [self._success_rate(record) for record in self._records.values() if record.visits]
        values = {
            "size": len(self._records),
            "cold": len(self._eligible) - len(self._low) - len(self._high),
            "low": len(self._low),
            "high": len(self._high),
            "in_flight": len(self._in_flight),
            "cooling": len(self._cooling),
            "success_mean": fmean(seen) if seen else self._config.target,
            "frontier_width": self._frontier_width,
            "unknown_results": self._unknown_results,
            "zero_variance_share": self._zero_variance_share,
        }
        return {f"pool/{name}": float(value) for name, value in values.items()}

    # Which prompts to draw

    def _select(self, n: int, step: int) -> list[str]:
        explored = self._explore(round(self._config.exploration * n), step)
        frontier = self._draw_frontier(n - len(explored))
        # Short only once low and high are empty: what is left to explore is cold.
        return explored + frontier + self._explore(n - len(explored) - len(frontier), step)

    def _explore(self, quota: int, step: int) -> list[str]:
        """Up to `quota` prompts: unseen ones, then stale ones, longest unvisited first."""
        picked: list[str] = []
        while len(picked) < quota and self._eligible:
            record = self._record(self._eligible.peek())
            if record.visits and step - record.last_step < self._config.stale_after_steps:
                break
            picked.append(self._take(self._eligible.peek()))
        return picked

    def _draw_frontier(self, m: int) -> list[str]:
        """Up to `m` at random of the 2m prompts met when walking from the target outwards, low and high by turns."""
        window: list[str] = []
        for heap in cycle((self._low, self._high)):
            if len(window) >= 2 * m or not (self._low or self._high):
                break
            if heap:
                window.append(self._take(heap.peek()))
        picked = self._rng.sample(window, min(m, len(window)))
        self.abort(list(set(window).difference(picked)))
        rates = [self._success_rate(self._record(prompt_id)) for prompt_id in picked]
        self._frontier_width = max((abs(rate - self._config.target) for rate in rates), default=0.0)
        return picked

    def _turn(self, record: _Record) -> Priority:
        """Order of the eligible prompts: unseen at random, then longest unvisited first."""
        return (record.last_step, record.ticket)

    # What is known of a prompt

    def _record(self, prompt_id: str) -> _Record:
        return self._records[prompt_id]

    def _learn(self, record: _Record, rewards: Sequence[float], step: int) -> None:
        record.successes = self._config.decay * record.successes + sum(rewards)
        record.trials = self._config.decay * record.trials + len(rewards)
        record.visits += 1
        record.last_step = step
        record.ticket = self._rng.random()

    def _success_rate(self, record: _Record) -> float:
        """Mean of the Beta posterior under a prior of `prior_strength` trials centred on the target."""
        prior = self._config.prior_strength
        return (record.successes + prior * self._config.target) / (record.trials + prior)

    # Where a prompt is

    def _fill_heaps(self, cooling: Collection[str]) -> None:
        """Place every prompt anew: `cooling` ones cool, all others are eligible, none is in flight."""
        self._eligible = IndexedHeap()  # cold, low and high together, by turn
        self._low, self._high = IndexedHeap(), IndexedHeap()  # each with the prompt nearest to the target on top
        self._cooling = IndexedHeap()  # by step of observation
        self._in_flight: set[str] = set()
        for prompt_id in self._records:
            if prompt_id in cooling:
                self._cool(prompt_id)
            else:
                self._make_eligible(prompt_id)

    def _make_eligible(self, prompt_id: str) -> None:
        record = self._record(prompt_id)
        self._eligible.push(prompt_id, self._turn(record))
        if record.visits:
            rate, target = self._success_rate(record), self._config.target
            heap = self._low if rate <= target else self._high
            heap.push(prompt_id, (abs(rate - target), record.last_step, record.ticket))

    def _take(self, prompt_id: str) -> str:
        self._eligible.remove(prompt_id)
        for heap in (self._low, self._high):
            if prompt_id in heap:
                heap.remove(prompt_id)
        self._in_flight.add(prompt_id)
        return prompt_id

    def _cool(self, prompt_id: str) -> None:
        record = self._record(prompt_id)
        self._cooling.push(prompt_id, (record.last_step, record.ticket))


class UniformPool(FrontierPool):
    """Every prompt once in random order, then every prompt again in a new order; the rest is as in FrontierPool."""

    def _select(self, n: int, step: int) -> list[str]:
        return [self._take(self._eligible.peek()) for _ in range(min(n, len(self._eligible)))]

    def _turn(self, record: _Record) -> Priority:
        return (record.visits, record.ticket)


def make_pool(prompts: Sequence[Prompt], config: PoolConfig, seed: int) -> PromptPool:
    """The pool of `config.strategy`. Raises DataError when there are no prompts or two have the same id."""
    pool = UniformPool if config.strategy == "uniform" else FrontierPool
    return pool(prompts, config, seed)

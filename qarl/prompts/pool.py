"""The prompt pool: rollouts go to the prompts that the policy solves about as often as the target says.

After HeaPA (github.com/horizon-rl/HeaPA), with two heaps that meet at a target success rate instead of the median.
Every prompt is in exactly one state:

    cold (nothing known) | low (success rate <= target) | high (> target)  --draw-->  in flight  --observe-->  cooling
         ^------------------------- abort -------------------------------------------'                    or retired
         ^------------------------- after cooldown_steps, or recheck_after_steps -----------------------------'

`docs/prompt_pool.md` tells what it costs and how it differs from what was published.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from enum import IntEnum
from itertools import islice
from random import Random
from statistics import fmean
from typing import Any

from qarl.config.pool import PoolConfig
from qarl.errors import ConfigError, DataError
from qarl.prompts.heap import LazyHeap, sortable
from qarl.prompts.lineage import Forest, child_rate
from qarl.prompts.state import VERSION, Archived, Gauges, parse, prompt_to_json, row_to_json
from qarl.prompts.stats import BINS, Statistics, check_counts, is_flat
from qarl.prompts.strategies import STRATEGIES
from qarl.types import GroupResult, Prompt


class State(IntEnum):
    """Where a prompt is; the first three are eligible for a draw."""

    COLD = 0
    LOW = 1
    HIGH = 2
    IN_FLIGHT = 3
    COOLING = 4
    RETIRED = 5
    ABSENT = 6  # a slot whose prompt was evicted


class Pool:
    """Draws prompts as `config.strategy` says.

    All draws depend on `seed` and the calls alone; draw k costs O(k log N), observe, abort and add O(log N) a prompt.

    Raises:
        DataError: there are no prompts or two have the same id.
        ConfigError: there are more prompts than `config.capacity`.
    """

    def __init__(self, prompts: Sequence[Prompt], config: PoolConfig, seed: int) -> None:
        if not prompts:
            raise DataError("no prompts", where="prompt pool", mend="check the training data")
        if len({prompt.id for prompt in prompts}) < len(prompts):
            twice = Counter(prompt.id for prompt in prompts).most_common(1)[0][0]
            raise DataError(f"prompt id '{twice}' is not unique", "prompt pool", mend="give each row its own id")
        if config.capacity is not None and len(prompts) > config.capacity:
            what = f"{config.capacity} is less than the {len(prompts)} prompts of the task"
            raise ConfigError(what, where="pool.capacity", mend="raise it, or take fewer prompts")
        self._task, self._config, self._rng = prompts, config, Random(seed)
        self._grown: set[str] = set()  # ids that are not the task's
        self._archive: dict[str, Archived] = {}  # longest archived first
        self._forgotten: set[str] = set()  # the task's ids that are in neither pool nor archive
        self._lineage = Forest()
        self._gauges = Gauges(arrivals=len(prompts))
        stats = Statistics(config)
        stats.fill([self._rng.random() for _ in prompts])
        self._fill(list(prompts), stats, cooling=frozenset(), retired=frozenset())

    def draw(self, n: int, step: int) -> list[Prompt]:
        """min(n, eligible) distinct prompts, now in flight; never one that is in flight, cooling or retired.

        Fewer than `n`, possibly none, means that the rest of the pool is in flight or rests.
        Raises DataError, before anything changes, when `n` or `step` is negative, or beyond `LAST_STEP`.
        """
        check_counts(n=n, step=step)
        for last in [last for last in self._waking if last < step]:
            self._release(list(self._waking.pop(last)))
        if step > self._gauges.reinsert_step:
            self._gauges.reinsert_step = step
            self._reinsert(step)
        refresh_every = self._config.lineage.refresh_every
        if refresh_every and step >= self._gauges.refresh_step + refresh_every:
            self._gauges.refresh_step = step
            self.refresh()
        drawn = self._strategy.select(n, step)
        self._drawn_at.update(dict.fromkeys(drawn, step))
        self._move(drawn, State.IN_FLIGHT)
        self._far.discard(drawn)
        return [self._prompt(slot) for slot in drawn]

    def observe(self, results: Sequence[GroupResult], step: int) -> None:
        """Record the rewards of prompts in flight, however many each has; the prompts then cool, or retire.

        A result of a prompt that is not in flight, or of an earlier draw than the one in flight (late, duplicate,
        unknown), changes nothing and is counted.
        Raises DataError, before anything is recorded, when rewards are missing or outside [0, 1], or `step` is none.
        """
        check_counts(step=step)
        are_flat = [is_flat(result) for result in results]
        stats, draws, slots, clock = self._stats, self._drawn_at, self._slots, self._strategy.clock
        observed, flat_groups, errors = [], [], []
        for result, flat in zip(results, are_flat, strict=True):
            slot, rewards = slots.get(result.prompt_id, -1), result.rewards
            if slot not in draws or result.drawn_at not in (None, draws[slot]):
                self._gauges.unknown_results += 1
                continue
            del draws[slot]
            if not stats.visits[slot] and stats.known(slot):
                errors.append(abs(stats.estimate[slot] - fmean(rewards)))
            stats.learn(slot, rewards, step, self._rng.random())
            stats.alarm_base[slot] = clock
            observed.append(slot)
            flat_groups.append(flat)
        settled = {slot for slot in observed if self._is_settled(slot)}
        self._rest([slot for slot in observed if slot not in settled], State.COOLING)
        self._rest(sorted(settled), State.RETIRED)
        if flat_groups:
            self._gauges.zero_variance_share = fmean(flat_groups)
        if errors:
            self._gauges.estimate_error = fmean(errors)

    def abort(self, prompt_ids: Sequence[str]) -> None:
        """Return prompts in flight, unobserved, to the state that they were drawn from; others are left alone."""
        slots = [self._slots.get(prompt_id, -1) for prompt_id in prompt_ids]
        self._release([slot for slot in slots if self._drawn_at.pop(slot, None) is not None])

    def spread(self, prompt_id: str) -> float:
        """Standard deviation expected of a reward of this prompt, in [0, 0.5]. Raises KeyError when it is not here."""
        return self._stats.spread(self._slots[prompt_id])

    def frontier(self, prompt_ids: Sequence[str], reach: float) -> list[str]:
        """Those of `prompt_ids` that have been measured and whose success rate lies within `reach` of the target."""
        slots = {prompt_id: self._slots[prompt_id] for prompt_id in prompt_ids if prompt_id in self._slots}
        stats = self._stats
        return [i for i, slot in slots.items() if stats.visits[slot] and stats.distance(slot) <= reach]

    def add(self, prompt: Prompt, parent_id: str = "", difficulty: float = 1.0) -> bool:
        """Take in a new prompt, made `difficulty` times as hard from `parent_id` (see lineage.py).

        At capacity the prompt furthest from the target leaves, unless all are in flight or none is further than the
        new one, which is then refused: False. A parent that is no longer in the pool counts as none.

        Raises:
            DataError: the id is in the pool, in the archive or the task's, or `difficulty` is out of bounds.
        """
        if prompt.id in self._slots or prompt.id in self._archive or prompt.id in self._forgotten:
            raise DataError(f"prompt id '{prompt.id}' is not unique", "prompt pool", mend="give it its own id")
        estimate = math.nan
        if (parent := self._slots.get(parent_id)) is not None:
            self._lineage.link(prompt.id, parent_id, difficulty)
            estimate = child_rate(self._stats.rate(parent), difficulty)
        self._grown.add(prompt.id)
        known = {"ticket": self._rng.random(), "alarm_base": self._strategy.clock, "estimate": estimate}
        if self._enter(prompt, known):
            return True
        self._gauges.refused += 1
        self._grown.discard(prompt.id)
        return False

    def refresh(self) -> None:
        """Re-estimate every prompt with children from them, O(V + E + V log N). Measurements stay what they are."""
        own = {prompt_id: self._stats.own_rate(self._slots[prompt_id]) for prompt_id in self._lineage.nodes()}
        estimates = self._lineage.aggregate(own, self._config.lineage.aggregate)
        for prompt_id in self._lineage.parents():
            slot = self._slots[prompt_id]
            eligible = self._state[slot] <= State.HIGH
            if eligible:
                self._strategy.remove(slot)
            self._stats.set_estimate(slot, estimates[prompt_id])
            if eligible:
                self._release([slot])
            elif slot in self._far:
                self._mark_far([slot])

    def state_dict(self) -> dict[str, Any]:
        """Everything that later draws depend on, ready for JSON, O(N). Columns are base64, see state.py."""
        slots = sorted(self._slots.values())
        self._gauges.clock, self._gauges.frontier_width = self._strategy.clock, self._strategy.width
        everyone = [*map(self._prompt, slots), *(entry.prompt for entry in self._archive.values())]
        return {
            "version": VERSION,
            "rng": list(self._rng.getstate()[1]),
            "ids": [self._prompt(slot).id for slot in slots],
            "columns": self._stats.columns(slots),
            "in_flight": self._ids(State.IN_FLIGHT),
            "cooling": self._ids(State.COOLING),
            "retired": self._ids(State.RETIRED),
            "grown": [prompt_to_json(prompt) for prompt in everyone if prompt.id in self._grown] if self._grown else [],
            "lineage": [list(link) for link in self._lineage.links()],
            "archive": {key: {"row": row_to_json(old.row), "step": old.step} for key, old in self._archive.items()},
            "forgotten": sorted(self._forgotten),
            "gauges": asdict(self._gauges),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`: the draws to come are those of the pool that wrote it.

        Prompts that were in flight return as if aborted, since their rollouts died with the process. Statistics are
        kept when the config (target, cool-down, strategy) has changed.

        Raises:
            CheckpointError: another version, other prompt ids, or incomplete; the pool is then as before.
            ConfigError: more prompts than `config.capacity`; likewise.
        """
        saved = parse(state, self._task)
        if self._config.capacity is not None and len(saved.prompts) > self._config.capacity:
            raise ConfigError(f"the state has {len(saved.prompts)} prompts", "pool.capacity", mend="raise it")
        stats = Statistics(self._config)
        stats.set_columns(saved.columns)
        self._rng, self._grown, self._lineage = saved.rng, saved.grown, saved.lineage
        self._archive, self._forgotten, self._gauges = saved.archive, saved.forgotten, saved.gauges
        self._fill(saved.prompts, stats, saved.cooling, saved.retired)

    def metrics(self) -> dict[str, float]:
        """Counts by state as of the last draw or observe, and how well the draws aim; O(1).

        `success_mean` is over seen prompts (the prior mean while there are none) and `success_hist_K` the share of
        them with a success rate in [K/10, K/10 + 0.1); `estimated` counts prompts with an estimate but no measurement
        yet, `augmented_share` is of prompts that are not the task's; `estimate_error` is the mean |estimate - first
        measurement| in the last observe that had any, `zero_variance_share` the share of groups with equal rewards in
        the last observe; `frontier_width` is the largest distance to the target among the frontier prompts of the
        last draw. `unknown_results`, `evicted`, `refused` and `reinserted` count since the start of the run.
        """
        stats, gauges, size = self._stats, self._gauges, len(self._slots)
        seen = max(stats.seen(), 1)
        values = {
            "size": size,
            **{state.name.lower(): self._sizes[state] for state in list(State)[: State.ABSENT]},
            "archived": len(self._archive),
            "estimated": stats.unseen_estimated,
            "augmented_share": self._num_grown / max(size, 1),
            "success_mean": stats.rate_mean(),
            **{f"success_hist_{k}": stats.histogram[k] / seen for k in range(BINS)},
            "frontier_width": self._strategy.width,
            "zero_variance_share": gauges.zero_variance_share,
            "estimate_error": gauges.estimate_error,
            "unknown_results": gauges.unknown_results,
            "evicted": gauges.evicted,
            "refused": gauges.refused,
            "reinserted": gauges.reinserted,
        }
        return {f"pool/{name}": float(value) for name, value in values.items()}

    # Where a prompt is

    def _fill(self, prompts: list[Prompt], stats: Statistics, cooling: frozenset[str], retired: frozenset[str]) -> None:
        """Place every prompt anew: `cooling` ones cool, `retired` ones rest, all others are eligible."""
        self._prompts: list[Prompt | None] = list(prompts)
        self._slots = {prompt.id: slot for slot, prompt in enumerate(prompts)}
        self._num_grown = len(self._slots.keys() & self._grown)  # in the pool
        self._free: list[int] = []
        self._drawn_at: dict[int, int] = {}  # of those in flight: the step of the draw
        self._stats = stats
        self._state = bytearray([State.ABSENT]) * len(prompts)
        self._sizes = [0] * len(State)
        self._sizes[State.ABSENT] = len(prompts)
        self._strategy = STRATEGIES[self._config.strategy](self._config, stats, self._prompts, self._rng)
        self._strategy.clock, self._strategy.width = self._gauges.clock, self._gauges.frontier_width
        self._waking: defaultdict[int, set[int]] = defaultdict(set)  # cooling and retired, by their last step of rest
        self._far = LazyHeap("QQd")  # all that may be evicted, when there is a capacity
        self._rest([self._slots[prompt_id] for prompt_id in sorted(cooling)], State.COOLING)
        self._rest([self._slots[prompt_id] for prompt_id in sorted(retired)], State.RETIRED)
        self._release([slot for slot, at in enumerate(self._state) if at == State.ABSENT])

    def _prompt(self, slot: int) -> Prompt:
        prompt = self._prompts[slot]
        assert prompt is not None
        return prompt

    def _ids(self, state: State) -> list[str]:
        return sorted(self._prompt(slot).id for slot, at in enumerate(self._state) if at == state)

    def _move(self, slots: Sequence[int], state: State) -> None:
        at, sizes = self._state, self._sizes
        for slot in slots:
            sizes[at[slot]] -= 1
            at[slot] = state
        sizes[state] += len(slots)

    def _release(self, slots: Sequence[int]) -> None:
        """Make eligible."""
        stats, rates, target = self._stats, self._stats.rates, self._stats.target
        known = [slot for slot in slots if stats.known(slot)]
        self._move(slots, State.COLD)
        self._move([slot for slot in known if rates[slot] <= target], State.LOW)
        self._move([slot for slot in known if rates[slot] > target], State.HIGH)
        self._strategy.add(slots)
        self._mark_far(slots)

    def _rest(self, slots: Sequence[int], state: State) -> None:
        """Cool or retire."""
        self._move(slots, state)
        waking, last_step, steps = self._waking, self._stats.last_step, self._rest_steps(state)
        for slot in slots:
            waking[last_step[slot] + steps].add(slot)
        self._mark_far(slots)

    def _rest_steps(self, state: int) -> int:
        """After an observation."""
        return self._config.retire.recheck_after_steps if state == State.RETIRED else self._config.cooldown_steps

    def _mark_far(self, slots: Sequence[int]) -> None:
        """Let them be evicted, if there is a capacity, by what is known of them now."""
        if self._config.capacity is not None:
            far, since, ticket = self._strategy.far, self._stats.last_step, self._stats.ticket
            self._far.push([(sortable(-far(slot)), since[slot] + 1, ticket[slot], slot) for slot in slots])

    def _is_settled(self, slot: int) -> bool:
        """Whether it looks solved or hopeless after enough visits."""
        retire = self._config.retire
        if not 0 < retire.after_visits <= self._stats.visits[slot]:
            return False
        measured = self._stats.measured(slot)
        return measured >= retire.solved_above or measured <= retire.hopeless_below

    # Who is in the pool

    def _enter(self, prompt: Prompt, known: Mapping[str, float]) -> bool:
        """Take `prompt` in; when that is one too many, the furthest leaves: it, on a tie."""
        victim = self._far.peek() if self._far else None
        slot = self._free.pop() if self._free else len(self._prompts)
        if slot == len(self._prompts):
            self._prompts.append(None)
            self._state.append(State.ABSENT)
            self._sizes[State.ABSENT] += 1
        self._prompts[slot], self._slots[prompt.id] = prompt, slot
        self._num_grown += prompt.id in self._grown
        self._stats.put(slot, **{**known, "arrival": self._gauges.arrivals})
        self._gauges.arrivals += 1
        self._release([slot])
        if self._config.capacity is None or len(self._slots) <= self._config.capacity:
            return True
        if victim is None or self._strategy.far(victim) <= self._strategy.far(slot):
            self._leave(slot)
            return False
        self._evict(victim)
        return True

    def _evict(self, slot: int) -> None:
        prompt, row = self._prompt(slot), self._stats.row(slot)
        self._leave(slot)
        self._gauges.evicted += 1
        self._remember(Archived(prompt, row, max(self._gauges.reinsert_step, 0)))

    def _remember(self, old: Archived) -> None:
        """Archive; the longest archived is forgotten when there is no room."""
        self._archive[old.prompt.id] = old
        if len(self._archive) > self._config.archive.capacity:
            prompt_id = next(iter(self._archive))
            del self._archive[prompt_id]
            if prompt_id in self._grown:
                self._grown.discard(prompt_id)
            else:
                self._forgotten.add(prompt_id)

    def _leave(self, slot: int) -> None:
        state, prompt_id = self._state[slot], self._prompt(slot).id
        if state <= State.HIGH:
            self._strategy.remove(slot)
        elif state in (State.COOLING, State.RETIRED):
            self._waking[self._stats.last_step[slot] + self._rest_steps(state)].remove(slot)
        self._far.discard([slot])
        self._stats.clear(slot)
        self._move([slot], State.ABSENT)
        self._lineage.remove(prompt_id)
        self._num_grown -= prompt_id in self._grown
        self._prompts[slot] = None
        del self._slots[prompt_id]
        self._free.append(slot)

    def _reinsert(self, step: int) -> None:
        """Let the longest archived prompts back in, up to the quota, where there is room or they are the nearer."""
        config = self._config.archive
        oldest = list(islice(self._archive.values(), config.reinsert_per_step))
        for old in oldest:
            if old.step + config.rest_steps >= step or self._archive.get(old.prompt.id) is not old:
                continue  # evicted too lately, or forgotten just now
            del self._archive[old.prompt.id]
            if self._enter(old.prompt, old.row):
                self._gauges.reinserted += 1
            else:
                self._remember(Archived(old.prompt, old.row, step))


def make_pool(prompts: Sequence[Prompt], config: PoolConfig, seed: int) -> Pool:
    """The pool of `config.strategy`. Raises as Pool does."""
    return Pool(prompts, config, seed)

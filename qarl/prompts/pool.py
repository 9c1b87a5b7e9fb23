"""The prompt pool: rollouts go to prompts that the policy solves about as often as the target says.

After HeaPA (github.com/horizon-rl/HeaPA), with a target success rate in place of the median. States of a prompt:

                     +------------------------- eligible ---------------------------+
    add, reinsert -> | cold (nothing known)  low (rate <= target)  high (> target)  |
                     +--------------------------------------------------------------+
                        | draw      ^ abort              ^ after cooldown_steps  ^ after recheck_after_steps
                        v           |                    |                       |
                        in flight --+-- observe --> cooling, or, when solved or hopeless, retired

Any prompt that is not in flight may be evicted to the archive, from which it may be reinserted.
`docs/prompt_pool.md` describes the costs and the differences to the published pool.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from random import Random
from statistics import fmean
from typing import Any, TypeGuard

from sortedcontainers import SortedKeyList

from qarl.config.pool import PoolConfig
from qarl.errors import ConfigError, DataError
from qarl.prompts.lineage import Forest, child_rate
from qarl.prompts.state import VERSION, Archived, Gauges, columns, parse, prompt_to_json, row
from qarl.prompts.stats import BINS, Record, Statistics, Status, check_counts, is_flat
from qarl.prompts.strategies import STRATEGIES
from qarl.types import GroupResult, Prompt


class Pool:
    """Draws prompts as `config.strategy` says.

    All draws depend on `seed` and the calls alone; draw k costs O(k log N), observe, abort and add O(log N) a prompt.

    Raises:
        DataError: there are no prompts or two have the same id.
        ConfigError: there are more prompts than `config.capacity`.
    """

    def __init__(self, prompts: Sequence[Prompt], config: PoolConfig, seed: int) -> None:
        if not prompts:
            raise DataError("no prompts", where="prompt pool", hint="check the training data")
        if len({prompt.id for prompt in prompts}) < len(prompts):
            twice = Counter(prompt.id for prompt in prompts).most_common(1)[0][0]
            raise DataError(f"prompt id '{twice}' is not unique", "prompt pool", hint="give each row its own id")
        if config.capacity is not None and len(prompts) > config.capacity:
            what = f"{config.capacity} is less than the {len(prompts)} prompts of the task"
            raise ConfigError(what, where="pool.capacity", hint="raise it, or take fewer prompts")
        self._task, self._config, self._rng = prompts, config, Random(seed)
        self._grown: set[str] = set()  # ids that are not the task's
        self._archive: dict[str, Archived] = {}  # longest archived first
        self._forgotten: set[str] = set()  # the task's ids that are in neither pool nor archive
        self._lineage = Forest()
        self._gauges = Gauges(arrivals=len(prompts))
        records = [Record(prompt, self._rng.random(), arrival=i) for i, prompt in enumerate(prompts)]
        self._fill(records, cooling=frozenset(), retired=frozenset())

    def draw(self, n: int, step: int) -> list[Prompt]:
        """min(n, eligible) distinct prompts, now in flight; never one that is in flight, cooling or retired.

        Fewer than `n`, possibly none, means that the rest of the pool is in flight or rests.
        Raises DataError, before anything changes, when `n` or `step` is negative or above `LAST_STEP`.
        """
        check_counts(n=n, step=step)
        for last in [last for last in self._waking if last < step]:
            self._release(self._waking.pop(last))
        if step > self._gauges.reinsert_step:
            self._gauges.reinsert_step = step
            self._reinsert(step)
        refresh_every = self._config.lineage.refresh_every
        if refresh_every and step >= self._gauges.refresh_step + refresh_every:
            self._gauges.refresh_step = step
            self.refresh()
        drawn = self._strategy.choose(n, step)
        return [self._send(record, step) for record in drawn]

    def draw_again(self, prompt_ids: Sequence[str], step: int) -> list[Prompt]:
        """Put prompts in flight as at `step`, after `load_state_dict` has returned them. Raises KeyError: not here."""
        records = [self._records[prompt_id] for prompt_id in prompt_ids]
        for record in records:
            self._strategy.remove(record)
        return [self._send(record, step) for record in records]

    def observe(self, results: Sequence[GroupResult], step: int) -> None:
        """Record the rewards of prompts in flight, however many each has; the prompts then cool, or retire.

        A result of a prompt that is not in flight, or of an earlier draw than the one in flight (late, duplicate,
        unknown), changes nothing and is counted.
        Raises DataError, before anything is recorded, when rewards are missing or outside [0, 1], or `step` is not a
        valid step.
        """
        check_counts(step=step)
        are_flat = [is_flat(result) for result in results]
        flat_groups, errors = [], []
        for result, flat in zip(results, are_flat, strict=True):
            record = self._records.get(result.prompt_id)
            if not _in_flight(record) or result.drawn_at not in (None, record.drawn_at):
                self._gauges.unknown_results += 1
                continue
            if not record.visits and record.known:
                errors.append(abs(record.estimate - fmean(result.rewards)))
            self._stats.learn(record, result.rewards, step, self._rng.random())
            record.alarm_base = self._strategy.clock
            self._rest(record, Status.RETIRED if self._may_retire(record) else Status.COOLING)
            self._set_evictable(record)
            flat_groups.append(flat)
        if flat_groups:
            self._gauges.zero_variance_share = fmean(flat_groups)
        if errors:
            self._gauges.estimate_error = fmean(errors)

    def abort(self, prompt_ids: Sequence[str]) -> None:
        """Return prompts in flight, unobserved, to the state that they were drawn from; others are left alone."""
        for record in map(self._records.get, prompt_ids):
            if _in_flight(record):
                self._release([record])
                self._set_evictable(record)

    def spread(self, prompt_id: str) -> float:
        """Expected standard deviation of a reward of this prompt, in [0, 0.5]. Raises KeyError when it is not here."""
        return self._stats.spread(self._records[prompt_id])

    def frontier(self, prompt_ids: Sequence[str], reach: float) -> list[str]:
        """Those of `prompt_ids` that have been measured and whose success rate lies within `reach` of the target."""
        records = {i: self._records[i] for i in prompt_ids if i in self._records}
        return [i for i, record in records.items() if record.visits and self._stats.distance(record) <= reach]

    def add(self, prompt: Prompt, parent_id: str = "", difficulty: float = 1.0) -> bool:
        """Take in a new prompt, made `difficulty` times as hard from `parent_id` (see lineage.py).

        At capacity, evict the prompt farthest from the target. If the new prompt is at least as far, or all others are
        in flight, reject it and return False. A parent that is no longer in the pool is ignored.
        Raises DataError: the id is in the pool, in the archive or the task's, or `difficulty` is out of bounds.
        """
        if prompt.id in self._records or prompt.id in self._archive or prompt.id in self._forgotten:
            raise DataError(f"prompt id '{prompt.id}' is not unique", "prompt pool", hint="give it its own id")
        record = Record(prompt, self._rng.random(), alarm_base=self._strategy.clock)
        if (parent := self._records.get(parent_id)) is not None:
            self._lineage.link(prompt.id, parent_id, difficulty)
            record.estimate = child_rate(parent.rate, difficulty)
        self._grown.add(prompt.id)
        if self._enter(record):
            return True
        self._gauges.refused += 1
        self._grown.discard(prompt.id)
        return False

    def refresh(self) -> None:
        """Re-estimate every prompt with children from them, O(V + E + V log N). Measurements stay what they are."""
        own = {prompt_id: self._stats.own_rate(self._records[prompt_id]) for prompt_id in self._lineage.nodes()}
        estimates = self._lineage.aggregate(own, self._config.lineage.aggregate)
        for record in [self._records[prompt_id] for prompt_id in self._lineage.parents()]:
            self._unlist(record)
            self._stats.set_estimate(record, estimates[record.prompt.id])
            if record.status <= Status.HIGH:
                self._release([record])
            if record.status != Status.IN_FLIGHT:
                self._set_evictable(record)

    def state_dict(self) -> dict[str, Any]:
        """Everything that later draws depend on, ready for JSON, O(N). Columns are base64, see state.py."""
        self._gauges.clock, self._gauges.frontier_width = self._strategy.clock, self._strategy.width
        records = list(self._records.values())
        everyone = [*records, *(old.record for old in self._archive.values())]
        return {
            "version": VERSION,
            "rng": list(self._rng.getstate()[1]),
            "ids": list(self._records),
            "columns": columns(records),
            "in_flight": self._ids(Status.IN_FLIGHT),
            "cooling": self._ids(Status.COOLING),
            "retired": self._ids(Status.RETIRED),
            "grown": [prompt_to_json(r.prompt) for r in everyone if r.prompt.id in self._grown],
            "lineage": [list(link) for link in self._lineage.links()],
            "archive": {key: {"row": row(old.record), "step": old.step} for key, old in self._archive.items()},
            "forgotten": sorted(self._forgotten),
            "gauges": self._gauges.model_dump(),
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
        if self._config.capacity is not None and len(saved.records) > self._config.capacity:
            raise ConfigError(f"the state has {len(saved.records)} prompts", "pool.capacity", hint="raise it")
        self._rng, self._grown, self._lineage = saved.rng, saved.grown, saved.lineage
        self._archive, self._forgotten, self._gauges = saved.archive, saved.forgotten, saved.gauges
        self._fill(saved.records, saved.cooling, saved.retired)

    def metrics(self) -> dict[str, float]:
        """Counts by status after the last call, and the success rates; O(1). docs/prompt_pool.md defines each."""
        stats, gauges, size = self._stats, self._gauges, len(self._records)
        seen = max(stats.seen(), 1)
        values = {
            "size": size,
            **{status.name.lower(): self._sizes[status] for status in list(Status)[: Status.ABSENT]},
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

    def _fill(self, records: list[Record], cooling: frozenset[str], retired: frozenset[str]) -> None:
        """Place every record anew: `cooling` and `retired` ones rest, all others are eligible."""
        self._records = {record.prompt.id: record for record in records}
        self._num_grown = len(self._records.keys() & self._grown)  # in the pool
        self._stats = Statistics(self._config)
        self._sizes = [0] * len(Status)  # by status; that of ABSENT means nothing
        self._strategy = STRATEGIES[self._config.strategy](self._config, self._stats, self._rng)
        self._strategy.clock, self._strategy.width = self._gauges.clock, self._gauges.frontier_width
        self._waking: defaultdict[int, set[Record]] = defaultdict(set)  # cooling and retired, by last step of rest
        self._evictable = SortedKeyList(key=self._first_evicted)  # all not in flight; empty without a capacity
        for record in records:
            self._stats.enter(record)
            if record.prompt.id in cooling or record.prompt.id in retired:
                self._rest(record, Status.COOLING if record.prompt.id in cooling else Status.RETIRED)
        self._release([record for record in records if record.status == Status.ABSENT])
        if self._config.capacity is not None:
            self._evictable.update(records)

    def _send(self, record: Record, step: int) -> Prompt:
        record.drawn_at = step
        self._move(record, Status.IN_FLIGHT)
        self._set_evictable(record, False)
        return record.prompt

    def _ids(self, status: Status) -> list[str]:
        return sorted(prompt_id for prompt_id, record in self._records.items() if record.status == status)

    def _move(self, record: Record, status: Status) -> None:
        self._sizes[record.status] -= 1
        self._sizes[status] += 1
        record.status = status

    def _release(self, records: Iterable[Record]) -> None:
        """Make eligible."""
        released = list(records)
        for record in released:
            known = Status.LOW if record.rate <= self._stats.target else Status.HIGH
            self._move(record, known if record.known else Status.COLD)
        self._strategy.add(released)

    def _rest(self, record: Record, status: Status) -> None:
        """Cool or retire."""
        self._move(record, status)
        self._waking[self._last_rest(record)].add(record)

    def _last_rest(self, record: Record) -> int:
        """The last step at which a cooling or retired prompt rests."""
        retired = record.status == Status.RETIRED
        return record.last_step + (self._config.retire.recheck_after_steps if retired else self._config.cooldown_steps)

    def _set_evictable(self, record: Record, evictable: bool = True) -> None:
        if self._config.capacity is not None:
            (self._evictable.add if evictable else self._evictable.remove)(record)

    def _first_evicted(self, record: Record) -> tuple[float, ...]:
        return -self._strategy.eviction_distance(record), record.last_step, record.ticket, record.arrival

    def _unlist(self, record: Record) -> None:
        """Take `record` out of the sorted lists, before its statistics change or it leaves."""
        if record.status <= Status.HIGH:
            self._strategy.remove(record)
        if record.status != Status.IN_FLIGHT:
            self._set_evictable(record, False)

    def _may_retire(self, record: Record) -> bool:
        """Whether it looks solved or hopeless after enough visits."""
        retire = self._config.retire
        if not 0 < retire.after_visits <= record.visits:
            return False
        return record.measured >= retire.solved_above or record.measured <= retire.hopeless_below

    # Who is in the pool

    def _enter(self, record: Record) -> bool:
        """Take `record` in. If that exceeds capacity, evict the prompt farthest from the target; on a tie reject the
        new one.
        """
        record.arrival = self._gauges.arrivals
        self._gauges.arrivals += 1
        self._stats.update_rate(record)
        if len(self._records) == self._config.capacity:
            distance, victim = self._strategy.eviction_distance, next(iter(self._evictable), None)
            if victim is None or distance(victim) <= distance(record):
                self._lineage.remove(record.prompt.id)
                return False
            self._evict(victim)
        self._records[record.prompt.id] = record
        self._num_grown += record.prompt.id in self._grown
        self._stats.enter(record)
        self._release([record])
        self._set_evictable(record)
        return True

    def _evict(self, record: Record) -> None:
        prompt_id = record.prompt.id
        self._unlist(record)
        if record.status in (Status.COOLING, Status.RETIRED):
            self._waking[self._last_rest(record)].remove(record)
        self._stats.leave(record)
        self._move(record, Status.ABSENT)
        self._lineage.remove(prompt_id)
        self._num_grown -= prompt_id in self._grown
        del self._records[prompt_id]
        self._gauges.evicted += 1
        self._archive_at(record, max(self._gauges.reinsert_step, 0))

    def _archive_at(self, record: Record, step: int) -> None:
        """Archive `record`. If that exceeds the archive's capacity, forget the prompt that was archived first."""
        self._archive[record.prompt.id] = Archived(record, step)
        if len(self._archive) > self._config.archive.capacity:
            prompt_id = next(iter(self._archive))
            del self._archive[prompt_id]
            if prompt_id in self._grown:
                self._grown.discard(prompt_id)
            else:
                self._forgotten.add(prompt_id)

    def _reinsert(self, step: int) -> None:
        """Try to enter the longest archived prompts, up to the quota; a rejected one goes to the end of the archive."""
        config = self._config.archive
        oldest = list(islice(self._archive.values(), config.reinsert_per_step))
        for old in oldest:
            if old.step + config.rest_steps >= step or self._archive.get(old.record.prompt.id) is not old:
                continue  # archived too recently, or forgotten just now
            del self._archive[old.record.prompt.id]
            if self._enter(old.record):
                self._gauges.reinserted += 1
            else:
                self._archive_at(old.record, step)


def _in_flight(record: Record | None) -> TypeGuard[Record]:
    return record is not None and record.status == Status.IN_FLIGHT

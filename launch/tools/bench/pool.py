"""`qarl bench pool`: what the prompt pool costs, by size and strategy, beside sorting everything at every step.

Times are CPU time of this process, which other processes on the machine disturb least.
"""

from __future__ import annotations

import gc
import json
import random
import time
import tracemalloc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal, Protocol

from qarl.config.pool import PoolConfig
from qarl.prompts.pool import make_pool
from qarl.types import GroupResult, Prompt

GROUP_SIZE = 8
SORT_STEPS = 3
MEMORY_STEPS = 20
SEED = 0


class Drawer(Protocol):
    """The part of a pool that is timed."""

    def draw(self, n: int, step: int) -> list[Prompt]: ...

    def observe(self, results: Sequence[GroupResult], step: int) -> None: ...


@dataclass(frozen=True)
class Times:
    """Milliseconds of CPU time of one call."""

    median: float
    p99: float
    worst: float

    @classmethod
    def of(cls, calls: Sequence[float]) -> Times:
        """Of calls in seconds, one or more."""
        ordered = sorted(1e3 * seconds for seconds in calls)
        return cls(median(ordered), ordered[int(0.99 * (len(ordered) - 1))], ordered[-1])

    def __str__(self) -> str:
        return f"{self.median:.2f} | {self.p99:.1f} | {self.worst:.1f}"


@dataclass(frozen=True)
class PoolCost:
    """One line of the table; NaN where nothing was measured."""

    name: str
    size: int
    draw: Times
    observe: Times
    snapshot_s: float = float("nan")
    restore_s: float = float("nan")
    state_mb: float = float("nan")
    bytes_per_prompt: float = float("nan")


class ResortPool:
    """The baseline: at every draw, sort all prompts that are not in flight by distance to the target."""

    def __init__(self, prompts: Sequence[Prompt]) -> None:
        self._prompts = {prompt.id: prompt for prompt in prompts}
        self._rate = {prompt.id: 0.5 for prompt in prompts}
        self._in_flight: set[str] = set()

    def draw(self, n: int, step: int) -> list[Prompt]:
        free = (prompt_id for prompt_id in self._prompts if prompt_id not in self._in_flight)
        drawn = sorted(free, key=lambda prompt_id: abs(self._rate[prompt_id] - 0.5))[:n]
        self._in_flight.update(drawn)
        return [self._prompts[prompt_id] for prompt_id in drawn]

    def observe(self, results: Sequence[GroupResult], step: int) -> None:
        for result in results:
            self._in_flight.remove(result.prompt_id)
            self._rate[result.prompt_id] = sum(result.rewards) / len(result.rewards)


def measure(sizes: Sequence[int], batch: int, steps: int) -> Iterator[PoolCost]:
    """One line per size and strategy, as soon as it is known.

    Every prompt has been seen once before the clock starts: then all are in the sorted lists, the costliest state.

    Args:
        sizes: prompts in the pool.
        batch: prompts of one draw and of one observe.
        steps: timed draws; the first steps, until the cool-down sends prompts back, are among them.
    """
    strategies: tuple[Literal["frontier", "uniform"], ...] = ("frontier", "uniform")
    for size in sizes:
        prompts = [Prompt(f"bench/{i}", "", "", ()) for i in range(size)]
        for strategy in strategies:
            yield _measure_pool(prompts, PoolConfig(strategy=strategy), batch, steps)
        resort = ResortPool(prompts)
        _see_all(resort, size)
        yield PoolCost("re-sort", size, *_time_steps(resort, batch, min(steps, SORT_STEPS)))


def table(rows: Iterator[PoolCost]) -> Iterator[str]:
    """The lines of a Markdown table."""
    yield (
        "| pool | prompts | draw ms | p99 | worst | observe ms | p99 | worst "
        "| snapshot s | restore s | state MB | bytes/prompt |\n"
        f"|---|{'---:|' * 11}"
    )
    for row in rows:
        rest = [row.snapshot_s, row.restore_s, row.state_mb, row.bytes_per_prompt]
        shown = ["" if value != value else f"{value:.2f}" for value in rest[:2]]
        shown += ["" if value != value else f"{value:.0f}" for value in rest[2:]]
        yield f"| {' | '.join([row.name, str(row.size), str(row.draw), str(row.observe), *shown])} |"


def _measure_pool(prompts: Sequence[Prompt], config: PoolConfig, batch: int, steps: int) -> PoolCost:
    pool = make_pool(prompts, config, SEED)
    _see_all(pool, len(prompts))
    times = _time_steps(pool, batch, steps)
    started = time.process_time()
    text = json.dumps(pool.state_dict())
    snapshot_s = time.process_time() - started
    del pool
    started = time.process_time()
    make_pool(prompts, config, SEED).load_state_dict(json.loads(text))
    restore_s = time.process_time() - started
    memory = _memory(prompts, config, batch, min(steps, MEMORY_STEPS)) / len(prompts)
    return PoolCost(config.strategy, len(prompts), *times, snapshot_s, restore_s, len(text) / 1e6, memory)


def _see_all(pool: Drawer, size: int) -> None:
    """Observe every prompt once, before the first step of the clock."""
    rng = random.Random(SEED)
    pool.observe([_result(prompt, rng) for prompt in pool.draw(size, 0)], 0)


def _result(prompt: Prompt, rng: random.Random) -> GroupResult:
    chance = rng.random()
    return GroupResult(prompt.id, tuple(float(rng.random() < chance) for _ in range(GROUP_SIZE)))


def _time_steps(pool: Drawer, batch: int, steps: int) -> tuple[Times, Times]:
    """Of the draws and of the observes."""
    rng = random.Random(SEED)
    pool.draw(0, 10)  # all wake up
    gc.collect()
    draws, observes = [], []
    for step in range(10, 10 + steps):
        started = time.process_time()
        drawn = pool.draw(batch, step)
        draws.append(time.process_time() - started)
        results = [_result(prompt, rng) for prompt in drawn]
        started = time.process_time()
        pool.observe(results, step)
        observes.append(time.process_time() - started)
    return Times.of(draws), Times.of(observes)


def _memory(prompts: Sequence[Prompt], config: PoolConfig, batch: int, steps: int) -> float:
    """Bytes that the pool holds besides `prompts`, after the same steps."""
    tracemalloc.start()
    pool = make_pool(prompts, config, SEED)
    _see_all(pool, len(prompts))
    _time_steps(pool, batch, steps)
    gc.collect()
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return float(held)

"""`qarl bench pool`: what the prompt pool costs, by size and strategy, beside sorting everything at every step.

Times are CPU time of this process, which other processes on the machine disturb least.
"""

import gc
import json
import random
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from statistics import median
from time import process_time
from typing import Literal, TypeVar

from qarl.config.pool import PoolConfig
from qarl.prompts.pool import Pool
from qarl.types import GroupResult, Prompt

GROUP_SIZE = 8
SORT_STEPS, MEMORY_STEPS = 3, 20
SEED = 0
HEADER = f"""\
| pool | prompts | draw ms | p99 | worst | observe ms | p99 | worst | snapshot s | restore s | state MB | bytes/prompt |
|---|{"---:|" * 11}"""
Result = TypeVar("Result")


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


def bench(sizes: Sequence[int], batch: int, steps: int) -> Iterator[str]:
    """A Markdown table with a line for each size and strategy, as soon as it is known.

    Every prompt has been seen once before the clock starts: then all are in the sorted lists, the costliest state.

    Args:
        sizes: prompts in the pool.
        batch: prompts of one draw and of one observe.
        steps: timed draws; the first steps, until the cool-down sends prompts back, are among them.
    """
    yield HEADER
    strategies: tuple[Literal["frontier", "uniform"], ...] = ("frontier", "uniform")
    for size in sizes:
        prompts = [Prompt(f"bench/{i}", "", "", ()) for i in range(size)]
        for strategy in strategies:
            yield _row(strategy, size, *_pool_costs(prompts, PoolConfig(strategy=strategy), batch, steps))
        yield _row(
            "re-sort", size, *_step_times(ResortPool(prompts), size, batch, min(steps, SORT_STEPS)), "", "", "", ""
        )


def _row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _pool_costs(prompts: Sequence[Prompt], config: PoolConfig, batch: int, steps: int) -> list[str]:
    """The cells of a pool, from its draws to its memory."""
    pool, size = Pool(prompts, config, SEED), len(prompts)
    times = _step_times(pool, size, batch, steps)
    snapshot_s, text = _timed(lambda: json.dumps(pool.state_dict()))
    restore_s, _ = _timed(lambda: Pool(prompts, config, SEED).load_state_dict(json.loads(text)))
    del pool
    tracemalloc.start()
    pool = Pool(prompts, config, SEED)
    _step_times(pool, size, batch, min(steps, MEMORY_STEPS))
    gc.collect()
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return [*times, f"{snapshot_s:.2f}", f"{restore_s:.2f}", f"{len(text) / 1e6:.0f}", f"{held / size:.0f}"]


def _step_times(pool: Pool | ResortPool, size: int, batch: int, steps: int) -> list[str]:
    """Median, 99th percentile and worst of the draws and of the observes, after one visit of every prompt."""
    rng = random.Random(SEED)
    pool.observe([_result(prompt, rng) for prompt in pool.draw(size, 0)], 0)
    pool.draw(0, 10)  # all wake up
    gc.collect()
    draws, observes = [], []
    for step in range(10, 10 + steps):
        seconds, drawn = _timed(lambda step=step: pool.draw(batch, step))  # type: ignore[misc]
        draws.append(1e3 * seconds)
        results = [_result(prompt, rng) for prompt in drawn]
        seconds, _ = _timed(lambda step=step, results=results: pool.observe(results, step))  # type: ignore[misc]
        observes.append(1e3 * seconds)
    cells = []
    for times in (sorted(draws), sorted(observes)):
        cells += [f"{median(times):.2f}", f"{times[int(0.99 * (len(times) - 1))]:.1f}", f"{times[-1]:.1f}"]
    return cells


def _timed(run: Callable[[], Result]) -> tuple[float, Result]:
    """Seconds of a call, and what it returned."""
    started = process_time()
    result = run()
    return process_time() - started, result


def _result(prompt: Prompt, rng: random.Random) -> GroupResult:
    chance = rng.random()
    return GroupResult(prompt.id, tuple(float(rng.random() < chance) for _ in range(GROUP_SIZE)))

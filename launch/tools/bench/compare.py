"""Times of several ways to do one thing, measured in turn, so that a busy machine slows all of them equally."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import median

HEADER = "| what | ms | by the first | range | target |\n|---|---:|---:|---:|---|"


@dataclass(frozen=True)
class Case:
    """Ways to do one thing. The others are compared with the first of `runs`.

    `targets`: the largest acceptable ratio of a run, by its name. `calls`: how often one run repeats the timed work.
    """

    what: str
    runs: Mapping[str, Callable[[], object]]
    targets: Mapping[str, float] = field(default_factory=dict)
    calls: int = 1


def compare(case: Case, rounds: int, clock: Callable[[], float] = time.process_time) -> list[str]:
    """Table rows: each run's median time, and its ratio to the first run's time of the same round: median and range.

    Args:
        rounds: in each, all runs follow one another. One more comes first and is not timed.
        clock: seconds; by default the CPU time of this process.
    """
    seconds: dict[str, list[float]] = {name: [] for name in case.runs}
    for _ in range(rounds + 1):
        for name, run in case.runs.items():
            started = clock()
            run()
            seconds[name].append(clock() - started)
    timed = {name: times[1:] for name, times in seconds.items()}
    first = next(iter(timed.values()))
    rows = []
    for name, times in timed.items():
        ratios = [mine / theirs for mine, theirs in zip(times, first, strict=True)]
        target = case.targets.get(name)
        met = "" if target is None else f"<= {target:g}: {'met' if median(ratios) <= target else 'MISSED'}"
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        milliseconds = 1e3 * median(times) / case.calls
        rows.append(f"| {case.what}: {name} | {milliseconds:.2f} | {median(ratios):.2f} | {spread} | {met} |")
    return rows

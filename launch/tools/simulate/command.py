"""What `qarl simulate` simulates and prints: rates from a plan, corrected by a run, for one or more configs."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Group, RenderableType

from launch import limits
from launch.preflight import model_config
from launch.run.resume import config_of_run
from launch.tools.plan.command import choose_device, table_of
from launch.tools.plan.devices import Device
from launch.tools.plan.planner import Planner
from launch.tools.plan.result import NOT_TIMED, Slowdown
from launch.tools.simulate.rates import Measured, Rates, calibrated, lognormal, rates_of
from launch.tools.simulate.simulate import Outcome, run
from qarl.config.derived import choose_counts
from qarl.config.io import validate
from qarl.config.run import Config
from qarl.errors import ConfigError

SPLITS = 9
"""Splits of the devices that are simulated at first; as many again lie around the best of them."""


@dataclass(frozen=True)
class Simulator:
    """Simulates configs of one model on one kind of device.

    Args:
        device: as in `choose_device`, or a device itself.
        steps: that count.
        network: bytes/s between machines.
        response_tokens, spread: mean of the responses' lengths (None: half of the most), and standard deviation of
            their logarithm; not used with `run_dir`.
        run_dir: folder of a run whose speed and lengths are taken.
        slowdown: what a plan has measured.
    """

    device: str | Device | None = None
    prompt_tokens: int | None = None
    response_tokens: int | None = None
    spread: float = 0.7
    steps: int = 20
    network: float = math.inf
    run_dir: Path | None = None
    slowdown: Slowdown = NOT_TIMED

    def simulate(self, config: Config) -> Outcome:
        """Raises ConfigError: the plan of this config has a fault."""
        device = self._device(config)
        width = model_config(config).hidden_size
        config = choose_counts(config, device.kind, limits.cores(), width=width)
        if self.run_dir is None:
            return self._run(config, self._rates(config, self._lengths(config)))
        before = config_of_run(self.run_dir)
        measured = Measured.of(self.run_dir, before)
        first, rates = (self._rates(one, measured.lengths, measured.informative) for one in (before, config))
        responses = before.train.prompts_per_step * before.train.group_size
        return self._run(config, calibrated(rates, first, measured, self._run(before, first).stages, responses))

    def splits(self, config: Config, devices: int) -> list[Outcome]:
        """The config with rollout workers on some of the devices, and learner ranks on the others; fastest first.

        Raises ConfigError: a plan finds a fault with each split.
        """
        found: dict[int, Outcome] = {}
        faults: list[ConfigError] = []
        first, last = 1, devices - 1
        for _ in range(2):
            for workers in _evenly(first, last):
                try:
                    if workers not in found:
                        found[workers] = self.simulate(_with_split(config, workers, devices - workers))
                except ConfigError as error:
                    faults.append(error)
            if not found:
                raise faults[0]
            best = max(found, key=lambda workers: found[workers].responses_per_s)
            tried = sorted(found)
            at = tried.index(best)
            first, last = tried[max(0, at - 1)], tried[min(len(tried) - 1, at + 1)]
        return sorted(found.values(), key=lambda outcome: -outcome.responses_per_s)

    def _device(self, config: Config) -> Device:
        return self.device if isinstance(self.device, Device) else choose_device(config, self.device)

    def _lengths(self, config: Config) -> list[int]:
        most = config.rollout.sampling.max_new_tokens
        return lognormal(self.response_tokens or max(1, most // 2), self.spread, most)

    def _rates(self, config: Config, lengths: Sequence[int], informative: float = 1.0) -> Rates:
        model, device = model_config(config), self._device(config)
        mean = max(1, round(fmean(lengths)))
        planner = Planner(config, model, device, self.prompt_tokens, mean)
        if faults := planner.faults():
            raise ConfigError(faults[0], "", "see `qarl plan`")
        one_machine = device.kind == "cpu" and config.cluster.address is None
        network = math.inf if one_machine else self.network
        return rates_of(planner.speeds().slowed(self.slowdown), config, lengths, network, informative)

    def _run(self, config: Config, rates: Rates) -> Outcome:
        device, threads, processors = self._device(config), 1, math.inf
        if device.kind == "cpu" and config.cluster.address is None:
            threads = config.learner.num_threads
            processors = float(limits.cores())
        elif device.kind == "cuda" and config.cluster.colocate:
            processors = float(config.rollout.num_workers)
        return run(config, rates, self.steps, processors, threads)


def _with_split(config: Config, workers: int, ranks: int) -> Config:
    """On devices of their own."""
    cluster = {"colocate": False, "address": config.cluster.address or "auto"}
    return _changed(config, rollout={"num_workers": workers}, learner={"num_ranks": ranks}, cluster=cluster)


def _changed(config: Config, **sections: dict[str, Any]) -> Config:
    tree = config.model_dump()
    for name, values in sections.items():
        tree[name] |= values
    return validate(tree, "qarl simulate")


def _evenly(first: int, last: int) -> list[int]:
    """Whole numbers from first to last, at most `SPLITS`."""
    count = min(SPLITS, last - first + 1)
    return sorted({round(first + (last - first) * i / max(1, count - 1)) for i in range(count)})


def to_json(outcomes: Sequence[Outcome], splits: Sequence[Sequence[Outcome]]) -> str:
    return json.dumps({"outcomes": [*map(tree, outcomes)], "splits": [[*map(tree, s)] for s in splits]}, indent=2)


def tree(outcome: Outcome) -> dict[str, Any]:
    """An outcome for JSON, with what follows from its fields."""
    return asdict(outcome) | {"steps_per_hour": outcome.steps_per_hour, "age": outcome.age}


def render(outcomes: Sequence[Outcome], splits: Sequence[Sequence[Outcome]]) -> RenderableType:
    """Tables for the terminal: the outcomes, which are the best of the `splits` where there are any."""
    title = "Simulated steps, with the best split of the devices" if splits else "Simulated steps"
    parts: list[RenderableType] = [table(title, outcomes), "\n".join(_details(outcomes))]
    for found in splits:
        parts.append(table(f"Splits of {found[0].workers + found[0].ranks} devices, fastest first", found))
    return Group(*parts)


def table(title: str, outcomes: Sequence[Outcome]) -> RenderableType:
    names = ("workers", "ranks", "staleness", "step, s", "steps/h", "resp./s", "idle", "learner", "age")
    found = table_of(title, *names)
    found.caption = "idle: share of the time in which workers, and the learner, wait; age: mean, in versions"
    for row in outcomes:
        speed = (f"{row.step_s:.3g}", f"{row.steps_per_hour:,.0f}", f"{row.responses_per_s:,.1f}")
        idle = (f"{row.workers_idle:.0%}", f"{row.learner_idle:.0%}", f"{row.age:.2f}")
        found.add_row(str(row.workers), str(row.ranks), str(row.max_staleness), *speed, *idle)
    return found


def _details(outcomes: Sequence[Outcome]) -> Iterator[str]:
    for row in outcomes:
        stages = ", ".join(f"{name} {seconds:.3g} s" for name, seconds in row.stages.items() if seconds)
        ages = ", ".join(f"{age}: {share:.0%}" for age, share in row.ages.items())
        back = f"; groups given back in a step: {row.given_back:.2g}" if row.given_back else ""
        yield f"staleness {row.max_staleness}: {row.tokens_per_s:,.0f} tokens/s; {stages}; ages {ages}{back}"

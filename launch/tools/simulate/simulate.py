"""The training loop, prompt pool and dispatcher as they are, among engines and a learner in virtual time."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

from launch.tools.simulate.engines import SimulatedFleet
from launch.tools.simulate.partners import SimulatedLearner, SimulatedRewards, StepTracker
from launch.tools.simulate.rates import Rates, stages_of
from launch.tools.simulate.world import World
from qarl.config.io import validate
from qarl.config.run import Config
from qarl.errors import ConfigError
from qarl.prompts.pool import Pool
from qarl.seeds import derive_seed
from qarl.types import Prompt
from trainer.checkpoint import CheckpointStore
from trainer.loop import Trainer


@dataclass(frozen=True)
class Outcome:
    """What a simulation shows: means over its steps that count."""

    workers: int
    ranks: int
    max_staleness: int
    step_s: float
    responses_per_s: float
    tokens_per_s: float
    workers_idle: float
    learner_idle: float
    stages: dict[str, float]
    """Seconds of the stages of a step, as `stages_of`."""
    ages: dict[int, float]
    """Share of what is learned from, by its age in versions."""
    given_back: float
    """Groups of a step whose prompts went back to the pool: stragglers, and those that were too old."""

    @property
    def steps_per_hour(self) -> float:
        return 3600 / self.step_s

    @property
    def age(self) -> float:
        """Mean age, in versions."""
        return sum(age * share for age, share in self.ages.items())


def run(config: Config, rates: Rates, steps: int, processors: float = math.inf, threads: int = 1) -> Outcome:
    """Simulate `steps` steps of a config. One before them does not count, nor the last ones, for which no later step's
    groups are sampled.

    Args:
        processors: of the one machine that all share; infinite where engines and learner have their own.
        threads: processors that a rank needs while it computes.
    """
    total = steps + 1 + config.train.steps_ahead
    config = _for_simulation(config, total)
    train, ranks = config.train, config.learner.num_ranks
    world = World(processors)
    learner = SimulatedLearner(world, rates, ranks, ranks * threads)
    fleet = SimulatedFleet(world, rates, config.rollout.num_workers, config.rollout.responses_at_once)
    tracker = StepTracker(world, learner, train.prompts_per_step * train.group_size * rates.driver_s)
    # Enough for every draw: a prompt that rests would change what is drawn, which is not what this is about.
    count = train.prompts_per_step * total * 4
    pool = Pool(_prompts("p", count), config.pool, derive_seed(config.seed, "pool"))
    with TemporaryDirectory() as folder:
        store, rewards = CheckpointStore(Path(folder), 1), SimulatedRewards(rates)
        Trainer(config, learner, fleet, rewards, pool, tracker, _prompts("h", 4), store, exact=True, clock=world).run()
    return _outcome(config, tracker.steps[: steps + 1], learner.ages[1 : steps + 1], rates.token)


def _outcome(config: Config, steps: Sequence[dict[str, float]], ages: Sequence[Counter[int]], token: int) -> Outcome:
    before, *rows = steps

    def mean(name: str) -> float:
        return fmean(row.get(name, 0.0) for row in rows)

    step_s, responses = mean("timing_s/step"), rows[-1]["training/rollouts"] - before["training/rollouts"]
    counted = sum(ages, Counter[int]())
    return Outcome(
        workers=config.rollout.num_workers,
        ranks=config.learner.num_ranks,
        max_staleness=config.train.max_staleness,
        step_s=step_s,
        responses_per_s=responses / len(rows) / step_s,
        tokens_per_s=fmean(row["perf/tokens_per_s"] * row["timing_s/step"] for row in rows) * token / step_s,
        workers_idle=mean("perf/workers_idle"),
        learner_idle=mean("perf/learner_idle"),
        stages=stages_of(rows),
        ages={age: counted[age] / counted.total() for age in sorted(counted)},
        given_back=mean("train/stragglers") + mean("train/too_old"),
    )


def _for_simulation(config: Config, steps: int) -> Config:
    """The config without what takes no part in a step, or is not simulated.

    Raises ConfigError: conversations, a schedule of schemes, or engines of several processes.
    """
    for key, is_set in {
        "environment.kind": config.environment.kind != "none",
        "rollout.schedule": bool(config.rollout.schedule),
        "rollout.tensor_parallel_size": config.rollout.tensor_parallel_size > 1,
    }.items():
        if is_set:
            raise ConfigError("is not simulated", key, "leave it at its default")
    tree = config.model_dump()
    changes: dict[str, dict[str, Any]] = {
        "train": {"steps": steps, "checkpoint_every": steps},
        "eval": {"every": steps, "num_prompts": 1, "final_num_prompts": 1, "num_samples": 1},
        "tracking": {"table_every": steps + 1},
        "error_tokens": {"mode": "off"},
        "debug": {"rollout_only": False, "train_from": None, "save_batches": False, "profile_steps": None},
    }
    for section, values in changes.items():
        tree[section] |= values
    tree["pool"] |= {"capacity": None}
    tree["pool"]["augment"] |= {"per_step": 0}
    return validate(tree, "qarl simulate")


def _prompts(prefix: str, count: int) -> list[Prompt]:
    return [Prompt(f"{prefix}{number}", "", "", (number,)) for number in range(count)]

"""A trainer among fakes, with the real prompt pool and checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from launch.run.prompts import make_augmenter
from qarl.config.io import validate
from qarl.config.run import Config
from qarl.config.task import SortingTaskConfig
from qarl.prompts.pool import Pool
from qarl.tasks import make_task
from qarl.types import Sample
from tests.support.fakes import FakeEngine, FakeFleet, FakeLearner, FakeRewards, FakeTracker, Fuse, make_prompts
from trainer.checkpoint import CheckpointStore
from trainer.clock import Clock
from trainer.loop import Trainer

PROMPTS = make_prompts(24)
HELDOUT = make_prompts(9, prefix="h")
TASK = make_task(SortingTaskConfig(num_prompts=24), lambda text: [1])
DIGITS, HELDOUT_DIGITS = TASK.load(0, 9, print)
GROUP = 4
AUGMENT = {"per_step": 3, "template": "{question}={beginning}", "pattern": "([0-9]+)", "reach": 0.5}


def make_config(**sections: dict[str, Any]) -> Config:
    tree: dict[str, Any] = {
        "model": {"path": "none"},
        "task": {"kind": "sorting"},
        "train": {"steps": 4, "prompts_per_step": 4, "group_size": GROUP, "checkpoint_every": 2},
        "eval": {"every": 2, "num_prompts": 5, "final_num_prompts": 9, "num_samples": 2},
        "learner": {"minibatches": 2},
        "rollout": {"sampling": {"temperature": 0.8, "max_new_tokens": 8}},
        "tracking": {"table_every": 3},
    }
    for name, section in sections.items():
        tree[name] = tree.get(name, {}) | section
    return validate(tree, "test")


class Run:
    """A trainer and the fakes around it; continues from the last checkpoint in `directory`."""

    def __init__(
        self,
        directory: Path,
        config: Config,
        engines: list[FakeEngine] | None = None,
        rewards: FakeRewards | None = None,
        exact: bool = True,
        kill_after: int | None = None,
        batches: Path | None = None,
        fleet: FakeFleet | None = None,
        learner: FakeLearner | None = None,
        clock: Clock | None = None,
        sleeps: bool = False,
    ) -> None:
        self.fuse = Fuse(kill_after)
        self.learner, self.fleet, self.tracker = learner or FakeLearner(), fleet or FakeFleet(engines), FakeTracker()
        prompts, heldout = (DIGITS, HELDOUT_DIGITS) if config.pool.augment.per_step else (PROMPTS, HELDOUT)
        self.pool = Pool(prompts, config.pool, seed=1)
        self.augmenter = make_augmenter(config, TASK, self.pool, prompts, heldout)
        checkpoints = CheckpointStore(directory, config.train.keep_checkpoints)
        guard = self.fuse.guard
        self.trainer = Trainer(
            config,
            guard(self.learner),
            guard(self.fleet),
            guard(rewards or FakeRewards()),
            guard(self.pool),
            guard(self.tracker),
            heldout,
            checkpoints,
            exact,
            self.augmenter,
            batches,
            clock,
            sleeps,
        )
        if saved := checkpoints.latest(print):
            self.trainer.resume(*saved)

    def steps(self, key: str) -> list[int]:
        """Steps whose metrics hold `key`."""
        return [step for step, metrics in self.tracker.rows if key in metrics]

    def values(self, key: str) -> list[float]:
        return [metrics[key] for _, metrics in self.tracker.rows if key in metrics]

    def state(self) -> dict[str, Any]:
        """All that must not depend on interruptions."""
        progress = {k: v for k, v in vars(self.trainer.progress).items() if k != "train_seconds"}
        augment = self.augmenter.state_dict() if self.augmenter else {}
        return {"theta": self.learner.theta, "pool": self.pool.state_dict(), "progress": progress, "augment": augment}


def ran(directory: Path, config: Config, rewards: FakeRewards) -> Run:
    """A run that has ended."""
    run = Run(directory, config, rewards=rewards)
    run.trainer.run()
    return run


def right_half(sample: Sample) -> float:
    """Only prompts with an odd number are informative: half of their responses are right."""
    return float(sample.worker) if int(sample.prompt.id[1:]) % 2 else 1.0


def advantages_of(run: Run) -> list[float]:
    """Of every sequence that the learner was given, in order."""
    return [s.advantage for update in run.learner.minibatches for m in update for s in m]

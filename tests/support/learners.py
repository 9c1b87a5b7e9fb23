"""Real learner ranks in Ray actors, and what they learn from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import ray

from qarl.config.io import load_config
from qarl.config.run import Config
from qarl.mismatch import Logprobs
from qarl.remote import free_address
from qarl.types import TrainSequence
from trainer.learner import LearnerRank, learner_env
from trainer.ranks import LearnerGroup

ROOT = Path(__file__).parents[2]


def config_of(model: Path, zero_stage: int, ranks: int, *more: str) -> Config:
    overrides = [
        *(f"model.path={model}", f"learner.zero_stage={zero_stage}", f"learner.num_ranks={ranks}"),
        *(
            "learner.max_tokens_per_micro_batch=64",
            "learner.optimizer.lr=1.0e-3",
            "learner.optimizer.warmup_steps=4",
            *more,
        ),
    ]
    return load_config(ROOT / "configs" / "quickstart.yaml", overrides)


def start(config: Config) -> LearnerGroup:
    master, ranks = free_address(), config.learner.num_ranks
    actor = ray.remote(LearnerRank).options(num_cpus=0, runtime_env={"env_vars": learner_env("cpu", 1)})
    return LearnerGroup([actor.remote(config, "cpu", rank, ranks, master) for rank in range(ranks)])


def sequences(count: int) -> list[TrainSequence]:
    rng = np.random.default_rng(0)

    def ids(low: int, high: int) -> tuple[int, ...]:
        return tuple(int(t) for t in rng.integers(4, 250, rng.integers(low, high)))

    batch = []
    for index in range(count):
        prompt = batch[-1].prompt_ids if index % 3 else ids(2, 9)  # three responses to each prompt
        response = ids(2, 12)
        batch.append(TrainSequence(prompt, response, np.zeros(len(response), np.float32), (-1.0) ** index))
    return batch


def with_prox(
    batch: list[TrainSequence], prox: list[Logprobs], sampler: list[Logprobs] | None = None
) -> list[TrainSequence]:
    """The batch with these log-probs; the sampler's are prox unless given."""
    return [
        replace(sequence, prox_logprobs_T=prox_T, sampler_logprobs_T=sampler_T)
        for sequence, prox_T, sampler_T in zip(batch, prox, sampler or prox, strict=True)
    ]

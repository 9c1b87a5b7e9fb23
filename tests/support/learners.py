"""Real learner ranks in Ray actors, and what they learn from."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import ray

from qarl.config.io import load_config
from qarl.config.run import Config
from qarl.mismatch import Logprobs
from qarl.quant.scheme import QuantScheme
from qarl.remote import free_address
from qarl.types import Numerics, TrainSequence
from trainer.learner import LearnerRank, learner_env
from trainer.policy import Policy
from trainer.ranks import LearnerGroup

ROOT = Path(__file__).parents[2]
State = dict[str, npt.NDArray[np.float32]]


class OpenRank(LearnerRank):
    """A rank that shows its optimizer's state. Fails when it builds an engine beside an earlier one.

    But for ZeRO stage 3, of whose engines DeepSpeed itself keeps parts.
    """

    _earlier: Sequence[weakref.ref[Any]] = ()

    def _start_engine(self, universal: bool = False) -> None:
        assert self._config.learner.zero_stage == 3 or not [ref() for ref in self._earlier if ref() is not None]
        super()._start_engine(universal)
        parts = (self._engine, self._policy, self._engine.optimizer, self._engine.basic_optimizer)
        self._earlier = [weakref.ref(part) for part in (*parts, *self._policy.parameters())]

    def state(self) -> State:
        """Masters, moments, counts of steps and learning rate, by name. All ranks must call it."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        optimizer = self._engine.basic_optimizer
        found = {"lr": np.array(self._engine.get_lr(), np.float32)}
        found["step"] = np.unique([float(state["step"]) for state in optimizer.state.values()]).astype(np.float32)
        for name, parameter in self._policy.named_parameters():
            is_sharded = self._config.learner.zero_stage > 0
            master = safe_get_full_fp32_param(parameter) if is_sharded else parameter
            found[name] = master.detach().numpy().reshape(-1)
            for key in ("exp_avg", "exp_avg_sq"):
                sharded = safe_get_full_optimizer_state(parameter, key) if is_sharded else None
                moment = optimizer.state[parameter][key] if sharded is None else sharded
                found[f"{name}.{key}"] = moment.numpy().reshape(-1)
        return found


class ChunkedRank(OpenRank):
    """A rank whose heads have the logits of 64 response tokens at a time."""

    def _make_policy(self, scheme: QuantScheme, numerics: Numerics) -> Policy:
        policy = super()._make_policy(scheme, numerics)
        policy.head_elements = 0
        return policy


def state_of(learner: LearnerGroup) -> State:
    """Of a group of `OpenRank`s."""
    states: list[State] = ray.get([rank.state.remote() for rank in learner.ranks])
    return states[0]


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


def start(config: Config, rank_type: type[OpenRank] = OpenRank) -> LearnerGroup:
    master, ranks = free_address(), config.learner.num_ranks
    actor = ray.remote(rank_type).options(num_cpus=0, runtime_env={"env_vars": learner_env("cpu", 1)})
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

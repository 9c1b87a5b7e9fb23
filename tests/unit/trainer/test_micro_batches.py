"""A learner rank's loss, gradient and memory in one process, without DeepSpeed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from qarl.quant.scheme import QuantScheme
from qarl.types import TrainSequence
from tests.support.learners import sequences, with_prox
from tests.support.runs import make_config
from trainer.batching import Batch
from trainer.learner import LearnerRank, learner_env
from trainer.policy import Policy

CPU = torch.device("cpu")
ALLOCATE = """
import ctypes
from resource import RUSAGE_SELF, getrusage

libc, size = ctypes.CDLL(None), 24 * 2**20
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]


def forward():
    tensors = [libc.malloc(size) for _ in range(8)]
    for tensor in tensors:
        libc.memset(tensor, 0, size)
    for tensor in reversed(tensors):
        libc.free(tensor)


for _ in range(5):
    forward()
before = getrusage(RUSAGE_SELF).ru_minflt
forward()
print(getrusage(RUSAGE_SELF).ru_minflt - before)
"""


class PlainEngine:
    """In place of DeepSpeed's: it adds up the gradients, and keeps the losses."""

    def __init__(self, policy: Policy) -> None:
        self._policy, self.losses = policy, list[float]()

    def __call__(self, *args: Any) -> Any:
        return self._policy(*args)

    def backward(self, loss: Tensor) -> None:
        self.losses.append(loss.item())
        loss.backward()


def rank_with(budget: int, objective: dict[str, Any]) -> LearnerRank:
    rank = object.__new__(LearnerRank)
    rank._config = make_config(
        rollout={"max_model_len": 16}, learner={"max_tokens_per_micro_batch": budget}, objective=objective
    )
    rank._rank, rank._world_size, rank._device = 0, 1, CPU
    return rank


def learned(
    policy: Policy, batch: Sequence[TrainSequence], budget: int, objective: dict[str, Any]
) -> tuple[int, float, Tensor]:
    """Micro-batches of `budget` tokens at most, their loss, and its gradient."""
    rank, engine = rank_with(budget, objective), PlainEngine(policy)
    rank._policy, rank._engine, rank._reference = policy, engine, None
    policy.zero_grad()
    for indices in rank._micro_batches(policy, batch):
        rank._backward(rank._loss_inputs(batch, indices), indices)
    grads = [parameter.grad.flatten() for parameter in policy.parameters() if parameter.grad is not None]
    return len(engine.losses), sum(engine.losses), torch.cat(grads)


@pytest.mark.parametrize("objective", [{"kind": "tbpo"}, {"kind": "dapo"}], ids=["by sequence", "by token"])
@pytest.mark.parametrize("numerics", ["portable", "engine"])
def test_neither_loss_nor_gradient_depends_on_the_token_budget(
    objective: dict[str, Any], numerics: Any, tiny_models: dict[str, Path]
) -> None:
    """Three responses share each prompt; the smaller budget parts them, so that a prompt is computed again."""
    policy = Policy(tiny_models["llama"], torch.float32, QuantScheme("none"), numerics)
    batch, rng = sequences(7), np.random.default_rng(0)
    with torch.no_grad():
        logp_BT = policy(Batch.of(batch, CPU)).logprobs_BT.numpy()
    scores = [logp_BT[row, : len(one.response_ids)] for row, one in enumerate(batch)]
    near = [(score_T + rng.normal(0, 1e-4, len(score_T))).astype(np.float32) for score_T in scores]
    batch = with_prox(batch, near)
    (one, whole_loss, whole), (several, loss, grad) = (learned(policy, batch, size, objective) for size in (1000, 20))
    assert one == 1
    assert several > 3
    assert whole_loss != 0
    assert loss == pytest.approx(whole_loss, rel=1e-5, abs=1e-7)
    assert whole.norm() > 0
    assert (grad - whole).norm() < 1e-4 * whole.norm()


@pytest.mark.parametrize(("numerics", "pads"), [("stock", True), ("portable", True), ("engine", False)])
def test_the_budget_counts_padding_where_the_backward_keeps_it(
    numerics: Any, pads: bool, tiny_models: dict[str, Path]
) -> None:
    policy, batch = Policy(tiny_models["llama"], torch.float32, QuantScheme("none"), numerics), sequences(12)
    parts = rank_with(40, {"kind": "tbpo"})._micro_batches(policy, batch)
    padded = [Batch.of([batch[i] for i in part], CPU).padded()[0].numel() for part in parts]
    assert (max(padded) <= 40) == pads


def test_a_forward_on_cpu_takes_the_memory_that_the_last_one_freed() -> None:
    def new_pages(env: dict[str, str]) -> int:
        done = subprocess.run([sys.executable, "-c", ALLOCATE], env=env, capture_output=True, text=True, check=True)
        return int(done.stdout)

    assert new_pages({**os.environ, **learner_env("cpu", 1)}) < 100
    assert new_pages(dict(os.environ)) > 10_000

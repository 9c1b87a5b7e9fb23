"""Planned bytes against real processes: the engine's KV cache, and what a DeepSpeed rank holds."""

from __future__ import annotations

import gc
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch

from launch.preflight import model_config
from launch.tools.plan.devices import CPU
from launch.tools.plan.memory import BUCKET
from launch.tools.plan.planner import Planner
from qarl.config.io import load_config
from qarl.config.run import Config
from qarl.config.schedule import scheme_at
from qarl.remote import free_address
from qarl.types import TrainSequence
from rollout.engine import VLLMEngine
from trainer.learner import LearnerRank, learner_env

ROOT = Path(__file__).parents[2]
SMALL = 4096
"""Bytes below which a tensor is bookkeeping, not memory."""


def test_kv_cache_is_the_engines(engine: VLLMEngine, tiny_models: dict[str, Path]) -> None:
    overrides = [f"model.path={tiny_models['qwen3']}", "rollout.max_model_len=768", "rollout.kv_cache_gib=1"]
    config = load_config(ROOT / "configs" / "quickstart.yaml", overrides)
    planned = Planner(config, model_config(config), CPU).plan().engine
    cache = engine._llm.llm_engine.vllm_config.cache_config
    assert planned.block == cache.block_size
    assert planned.tokens == cache.num_gpu_blocks * cache.block_size
    assert planned.sequences(768) == engine._fitting(768)


def held_bytes(config: Config, number: int, ranks: int, master: str) -> tuple[int, int]:
    """What a rank holds before its second optimizer step, when moments and gradients are there, and after it."""
    rank, seen = LearnerRank(config, "cpu", number, ranks, master), list[int]()
    rank.start()
    step = rank._engine.step
    rank._engine.step = lambda: (seen.append(live_bytes()), step())
    none = np.zeros(3, np.float32)
    minibatch = [TrainSequence((4, 5, 6), (7, 8, 9), none, (-1.0) ** i, prox_logprobs_T=none) for i in range(4)]
    rank.score(minibatch, aligned=True)
    rank.update([minibatch] * 2)
    return seen[1], live_bytes()


def live_bytes() -> int:
    """Bytes of all distinct tensors of this process."""
    gc.collect()
    tensors = [item for item in gc.get_objects() if isinstance(item, torch.Tensor)]
    tensors += [tensor.grad for tensor in tensors if tensor.is_leaf and tensor.grad is not None]
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(size for size in sizes.values() if size > SMALL)


def config_of(model: Path, stage: int, ranks: int, dtype: str) -> Config:
    overrides = [f"model.path={model}", f"model.dtype={dtype}", f"learner.zero_stage={stage}", "learner.minibatches=2"]
    overrides += [f"learner.num_ranks={ranks}", "mismatch.unaligned_every=0"]
    return load_config(ROOT / "configs" / "quickstart.yaml", overrides)


@pytest.mark.parametrize(
    ("stage", "ranks", "dtype"),
    [
        (1, 1, "bfloat16"),
        pytest.param(1, 2, "bfloat16", marks=pytest.mark.slow),
        pytest.param(2, 2, "bfloat16", marks=pytest.mark.slow),
        pytest.param(3, 2, "bfloat16", marks=pytest.mark.slow),
        pytest.param(0, 1, "float32", marks=pytest.mark.slow),
        pytest.param(2, 2, "float32", marks=pytest.mark.slow),
    ],
)
def test_a_rank_holds_what_is_planned(
    stage: int, ranks: int, dtype: str, tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(tiny_models["qwen3"], stage, ranks, dtype)
    planner = Planner(config, model_config(config), CPU)
    planned, codes = planner.plan().learner[stage], planner._variant(scheme_at(config.rollout, 1)).packed_bytes
    for name, value in learner_env("cpu", 1).items():
        monkeypatch.setenv(name, value)
    with ProcessPoolExecutor(ranks, get_context("spawn")) as processes:
        master = free_address()
        found = [processes.submit(held_bytes, config, rank, ranks, master) for rank in range(ranks)]
        before, after = found[0].result(timeout=300)
    held = planned.weights + planned.masters + planned.optimizer
    kept_bucket = BUCKET * (2 if dtype == "bfloat16" else 4) if stage == 3 else 0
    accumulators = 2 * planned.gradients // 3 if (stage, dtype) == (1, "bfloat16") else 0
    assert after == pytest.approx(held + kept_bucket + accumulators + codes, rel=0.03)
    # the layouts of oneDNN are no tensors; the codes of before the update are on one rank each
    both = codes + codes // ranks
    assert before == pytest.approx(held + planned.gradients + kept_bucket + both, rel=0.03)

"""Real DeepSpeed learner ranks in Ray actors, over ZeRO stages and rank counts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from safetensors.torch import load_file

from qarl.errors import ObjectiveError
from qarl.mismatch import Logprobs
from qarl.quant.linear import requantize
from qarl.quant.publish import publish
from qarl.quant.scheme import KernelKind, QuantScheme
from qarl.types import TrainSequence
from qarl.weights.wire import unpack
from tests.support.learners import ChunkedRank, OpenRank, config_of, sequences, start, with_prox
from trainer.batching import Batch
from trainer.deepspeed_files import checkpoint_weights
from trainer.policy import Policy


@pytest.fixture(scope="module", autouse=True)
def local_ray() -> Iterator[None]:
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="error")
    yield
    ray.shutdown()


@pytest.mark.parametrize(
    ("kind", "zero_stage", "ranks", "scheme"),
    [
        ("qwen3", 1, 2, QuantScheme()),
        ("qwen3", 3, 2, QuantScheme("w4a16", group_size=32)),
        pytest.param("qwen3", 3, 2, QuantScheme(), marks=pytest.mark.slow),
        pytest.param("qwen3", 0, 1, QuantScheme(), marks=pytest.mark.slow),
        pytest.param("qwen3", 2, 2, QuantScheme("w4a16", group_size=32), marks=pytest.mark.slow),
        # siblings share a scale across shards
        pytest.param("qwen3", 3, 2, QuantScheme("nvfp4a16"), marks=pytest.mark.slow),
        pytest.param("qwen3_moe", 3, 2, QuantScheme(), marks=pytest.mark.slow),
    ],
)
def test_ranks_score_update_publish_save_and_load(
    kind: str, zero_stage: int, ranks: int, scheme: QuantScheme, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    """Sharded, with gradient checkpointing in the sharded cases: the values of one plain process, bit for bit."""
    kernel: KernelKind = "reference" if scheme.name == "nvfp4a16" else "auto"
    more = (
        f"learner.kernel={kernel}",
        f"rollout.scheme={scheme.name}",
        f"rollout.group_size={scheme.group_size}",
        f"learner.gradient_checkpointing={str(zero_stage > 1).lower()}",
    )
    if zero_stage < 3:
        more += ("train.max_staleness=1", "mismatch.stale_share=1")
    config = config_of(tiny_models[kind], zero_stage, ranks, *more)
    learner = start(config)
    batch = sequences(7)  # not a multiple of ranks
    prox = learner.score(batch)
    assert np.array_equal(learner.score(batch[:1])[0], prox[0])  # all ranks but one are idle

    policy = Policy(tiny_models[kind], torch.bfloat16, scheme, "engine", kernel=kernel)
    with torch.no_grad():
        alone_BT = policy(Batch.of(batch, torch.device("cpu"))).logprobs_BT
    assert all(np.array_equal(p, alone_BT[i, : len(p)].numpy()) for i, p in enumerate(prox))
    assert learner.publish(3).manifest.digest == publish(policy.model, scheme, 3).manifest.digest

    with pytest.raises(ObjectiveError, match="has no prox log-probs"):
        learner.update([batch])
    # Ratios are measured before the first optimizer step: a second minibatch does not count.
    result = learner.update([with_prox(batch, prox)] * 2)
    assert result.first_minibatch_ratio_dev == 0.0
    assert result.metrics["actor/seq_ratio_max_dev"] > 0  # the first step of the warm-up moves the weights already
    assert result.metrics["actor/lr"] == pytest.approx((2.5e-4 + 5e-4) / 2)
    assert result.metrics["actor/grad_norm"] > 0
    assert 0 < result.metrics["quant/codes_changed"] < 1
    assert 0 < result.metrics["quant/update_below_grid"] <= 1
    updated, after = learner.score(batch), learner.publish(4)
    if zero_stage < 3:  # the weights of version 3 are kept, and those of now come back
        assert all(map(np.array_equal, learner.score(batch, version=3), prox))
        assert all(map(np.array_equal, learner.score(batch), updated))
        assert learner.publish(4).manifest.digest == after.manifest.digest
    assert len(list(unpack(after))) == len(after.manifest.tensors)  # what was stored is what was digested
    assert after.manifest.digest != publish(policy.model, scheme, 4).manifest.digest

    learner.save(str(tmp_path))
    rates = [learner.update([with_prox(batch, prox)]).metrics["actor/lr"] for _ in range(3)]
    assert rates == pytest.approx([7.5e-4, 1e-3, 1e-3])
    assert learner.publish(4).manifest.digest != after.manifest.digest
    learner.load(str(tmp_path))
    assert learner.publish(4).manifest.digest == after.manifest.digest
    learner.close()
    policy.load_state_dict(checkpoint_weights(str(tmp_path), zero_stage))
    requantize(policy.model)
    assert publish(policy.model, scheme, 4).manifest.digest == after.manifest.digest
    with torch.no_grad():  # no layer of the updated learner has kept what it laid out for its GEMM before
        alone_BT = policy(Batch.of(batch, torch.device("cpu"))).logprobs_BT
    assert all(np.array_equal(row, alone_BT[i, : len(row)].numpy()) for i, row in enumerate(updated))


def parted(batch: list[TrainSequence], scores: list[Logprobs]) -> list[TrainSequence]:
    """The batch with three policies apart: prox is near the learner, the sampler near prox."""
    rng = np.random.default_rng(1)

    def near(rows: list[Logprobs]) -> list[Logprobs]:
        return [row + rng.normal(0, 0.3, len(row)).astype(np.float32) for row in rows]

    prox = near(scores)
    return with_prox(batch, prox, near(prox))


def ratio_dev(batch: list[TrainSequence], scores: list[Logprobs]) -> float:
    """max |r_seq - 1| in float64."""
    pairs = zip(batch, scores, strict=True)
    return max(abs(np.exp(np.mean(row.astype(np.float64) - s.prox_logprobs_T)) - 1) for s, row in pairs)


TBPO = ("objective.kind=tbpo", "objective.seq_tis_imp_ratio_cap=1.0")
DAPO = ("objective.kind=dapo", "objective.correction.kind=token_tis", "objective.correction.cap=1.2")


@pytest.mark.parametrize(
    ("objective", "weight", "dtype"),
    [
        pytest.param(TBPO, "seq", "bfloat16", id="tbpo"),
        pytest.param(DAPO, "token", "float32", id="dapo", marks=pytest.mark.slow),
    ],
)
def test_update_does_not_depend_on_ranks_or_micro_batches(
    objective: tuple[str, ...], weight: str, dtype: str, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    """One objective normalised by sequences, one by tokens; clips and weights bind for some of them. With an idle
    micro-batch, a bonus and a penalty (k1: its value is 0 at first, its gradient is not)."""
    before = load_file(tiny_models["qwen3"] / "model.safetensors")
    batch, found, steps = sequences(7), [], []
    for ranks, size in ((1, 1000), (2, 64)):
        more = (f"learner.max_tokens_per_micro_batch={size}", f"model.dtype={dtype}", *objective)
        more += ("objective.kl_coef=0.5", "objective.kl_estimator=k1", "objective.entropy_coef=0.1")
        learner = start(config_of(tiny_models["qwen3"], 1, ranks, *more))
        scores = learner.score(batch)
        apart = parted(batch, scores)
        result = learner.update([apart])
        metrics = result.metrics
        learner.export(str(tmp_path / "after"), quantized=False)
        learner.close()
        assert result.first_minibatch_ratio_dev == pytest.approx(ratio_dev(apart, scores), rel=1e-4)
        assert metrics["actor/kl_loss"] == 0.0  # the reference is the model before training, computed alike
        assert metrics["actor/entropy"] > 0
        for share in ("actor/clip_fraction", f"actor/{weight}_mismatch_weight_capped", "actor/tokens_dropped"):
            assert 0 < metrics[share] < 1
            assert metrics[share] == pytest.approx((found or [metrics])[0][share])
        found.append(metrics)
        after = load_file(tmp_path / "after" / "model.safetensors")
        steps.append(torch.cat([(after[name].float() - before[name].float()).flatten() for name in before]))
    # bfloat16 rounds each micro-batch's gradient once; their sum is kept in float32.
    norms, losses = ([metrics[f"actor/{name}"] for metrics in found] for name in ("grad_norm", "loss"))
    assert norms[1] == pytest.approx(norms[0], rel=1e-4 if dtype == "float32" else 1e-2)
    assert losses[1] == pytest.approx(losses[0], abs=1e-6)
    # Adam's first step is nearly the sign of each gradient: those near 0 may fall on either side.
    assert (steps[1] - steps[0]).norm() < (1e-3 if dtype == "float32" else 0.1) * steps[0].norm()


@pytest.mark.slow
@pytest.mark.parametrize("numerics", ["engine", "portable"])
def test_a_head_in_chunks_learns_alike_where_weights_are_sharded(
    numerics: str, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    before = load_file(tiny_models["qwen3"] / "model.safetensors")
    rng, steps = np.random.default_rng(0), []
    rows = [TrainSequence((5, 6), tuple(rng.integers(4, 250, 90).tolist()), np.zeros(90, np.float32)) for _ in range(4)]
    batch = [replace(row, advantage=(-1.0) ** index) for index, row in enumerate(rows)]
    for rank_type, stage in ((OpenRank, 1), (ChunkedRank, 3)):
        more = ("learner.max_tokens_per_micro_batch=1000", "model.dtype=float32", f"learner.numerics={numerics}")
        learner = start(config_of(tiny_models["qwen3"], stage, 2, *more), rank_type)
        learner.update([with_prox(batch, learner.score(batch))])
        learner.export(str(tmp_path / "after"), quantized=False)
        learner.close()
        after = load_file(tmp_path / "after" / "model.safetensors")
        steps.append(torch.cat([(after[name].float() - before[name].float()).flatten() for name in before]))
    assert steps[0].any()
    # Adam's first step is nearly the sign of each gradient: those near 0 may fall on either side.
    assert (steps[1] - steps[0]).norm() < 1e-2 * steps[0].norm()

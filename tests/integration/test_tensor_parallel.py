"""A tensor-parallel engine of two processes, and the learner that computes in its parts: bit for bit.

`pytest -m slow tests/integration/test_tensor_parallel.py`: each engine starts two processes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from qarl.config.policy import RolloutConfig
from qarl.errors import PublicationError
from qarl.quant.publish import publish, write_engine_config
from qarl.quant.scheme import QuantScheme, SchemeName
from qarl.weights.wire import seal
from rollout.engine import VLLMEngine
from tests.support.real_engine import gap, perturbed, requests
from tests.support.small_run import train
from trainer.policy import Policy

pytestmark = pytest.mark.slow
ROW_SHARD = "model.layers.1.mlp.down_proj.weight"


class Pair(NamedTuple):
    engine: VLLMEngine
    policy: Policy
    whole: Policy
    """The learner of an engine of one process."""
    scheme: QuantScheme


@pytest.fixture(
    scope="module",
    params=[("w8a8_int8", "bfloat16"), ("w8a8_int8", "float32"), ("none", "float32"), ("none", "bfloat16")],
    ids=lambda case: "-".join(case),
)
def pair(
    request: pytest.FixtureRequest, tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pair]:
    name: SchemeName
    name, dtype = request.param
    scheme, folder, model = QuantScheme(name), tmp_path_factory.mktemp("engine"), tiny_models["qwen3"]
    write_engine_config(folder, model, scheme)
    policy, whole = (Policy(model, getattr(torch, dtype), scheme, "engine", shards=shards) for shards in (2, 1))
    engine = VLLMEngine(folder, RolloutConfig(max_model_len=768, tensor_parallel_size=2), scheme, dtype, "cpu")
    yield Pair(engine, policy, whole, scheme)
    engine._llm.llm_engine.engine_core.shutdown()


def test_mismatch_is_zero_and_that_of_undivided_layers_is_not(pair: Pair) -> None:
    engine, policy, whole, scheme = pair
    engine.load(publish(policy.model, scheme, 1))
    samples = engine.generate(requests(24, 64))
    assert {sample.version for sample in samples} == {1}
    assert gap(policy, samples).abs_max == 0.0
    assert gap(whole, samples).abs_max > 0.0


def test_damage_is_refused_and_the_version_before_is_loaded_again(pair: Pair) -> None:
    engine, policy, _, scheme = pair
    good = publish(policy.model, scheme, 1)
    engine.load(good)
    damaged = tuple(
        replace(tensor, data=tensor.data[::-1].copy()) if tensor.name == ROW_SHARD else tensor
        for tensor in good.tensors
    )
    with pytest.raises(PublicationError, match=f"{ROW_SHARD} differs from its digest; version 1 is loaded again"):
        engine.load(replace(good, tensors=damaged))
    with pytest.raises(PublicationError, match="they are in w4a16-g32"):
        engine.load(seal(2, "w4a16-g32", good.tensors))
    changed = publish(perturbed(policy, scheme).model, scheme, 2).tensors
    kept = [tensor for tensor in changed if not tensor.name.startswith("model.layers.1.mlp.up_proj")]
    with pytest.raises(PublicationError, match=r"model.layers.1.mlp.gate_up_proj does not compute"):
        engine.load(seal(2, scheme.label, kept))
    assert gap(policy, engine.generate(requests(4, 20))).abs_max == 0.0


def test_a_run(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    """Learner, placement, publication and probes of `qarl train`, with an engine of two processes in its actor."""
    done = train(tmp_path, tiny_models["qwen3"], "rollout: {tensor_parallel_size: 2}\nrun: {name: two}\n")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "runs" / "two" / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "reward/mean" in row]
    assert len(steps) == 2
    for row in steps:
        assert row["mismatch/logp_abs_max"] == row["mismatch/probe_logp_abs_max"] == 0.0

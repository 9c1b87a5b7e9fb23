"""How near the portable learner of a trained model comes to what the real engine sampled."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from launch.demo.tiny_model import ensure_model
from qarl.config.policy import ModelConfig, RolloutConfig, SFTConfig, TinyModelConfig
from qarl.config.task import SortingTaskConfig
from qarl.numerics import processor
from qarl.quant.publish import publish, write_engine_config
from qarl.quant.scheme import QuantScheme
from qarl.types import Sample
from rollout.engine import VLLMEngine
from tests.support.hosts import EXACT_W8A8, needs_avx512
from tests.support.real_engine import gap, requests
from trainer.policy import Policy

TOKENS = 256
BUILD = TinyModelConfig(  # of the shapes of the `engine` fixture's model
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=3,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=32,
    vocab_size=256,
    max_position_embeddings=1024,
    sft=SFTConfig(steps=60, batch_size=4, pack_tokens=128, warmup_steps=10),
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that writes sorting problems without end."""
    path = tmp_path_factory.mktemp("trained") / "model"
    ensure_model(ModelConfig(path=str(path), build=BUILD), SortingTaskConfig(), 0, lambda _: None)
    return path


def sampled(engine: VLLMEngine, learner: Policy, scheme: QuantScheme) -> list[Sample]:
    engine.load(publish(learner.model, scheme, 0))
    return engine.generate([replace(request, ignore_eos=True) for request in requests(8, TOKENS)])


def check(model: Path, samples: list[Sample], scheme: QuantScheme, dtype: torch.dtype, share: float) -> None:
    """The mean |d log p| is at most a `share` of what transformers' roundings leave.

    A share, since the gap itself grows with the model's depth and falls with its training.
    """
    kernel = EXACT_W8A8 if scheme.name == "w8a8_int8" else "auto"
    portable, stock = (
        gap(Policy(model, dtype, scheme, numerics, kernel=kernel), samples).abs_mean
        for numerics in ("portable", "stock")
    )
    assert 0.0 < portable <= share * stock


def test_w8a8(engine: VLLMEngine, trained: Path) -> None:
    learner = Policy(trained, torch.bfloat16, QuantScheme(), "engine")
    samples = sampled(engine, learner, QuantScheme())
    assert gap(learner, samples).abs_max == 0.0
    check(trained, samples, QuantScheme(), torch.bfloat16, 0.1 if processor.has_avx512() else 0.25)


@pytest.mark.parametrize(
    ("scheme", "dtype", "share"),
    [
        (QuantScheme("none"), torch.bfloat16, 0.4),
        # Attention is nearly all that differs: float32 RoPE has few roundings, and without AVX-512 transformers' own.
        (QuantScheme(), torch.float32, 1.0),
        pytest.param(QuantScheme("w4a16", group_size=32), torch.bfloat16, 0.5, marks=needs_avx512),
    ],
)
def test_other_formats(scheme: QuantScheme, dtype: torch.dtype, share: float, trained: Path, tmp_path: Path) -> None:
    write_engine_config(tmp_path, trained, scheme)
    name = str(dtype).removeprefix("torch.")
    other = VLLMEngine(tmp_path, RolloutConfig(max_model_len=512), scheme, name, "cpu")
    learner = Policy(trained, dtype, scheme, "engine")
    samples = sampled(other, learner, scheme)
    if dtype == torch.bfloat16:
        assert gap(learner, samples).abs_max == 0.0
    check(trained, samples, scheme, dtype, share)

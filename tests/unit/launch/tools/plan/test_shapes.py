"""Matrices of published models by hand, and of real tiny models by counting."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from launch.tools.plan.shapes import Matrix, shapes_of
from qarl.errors import ModelError
from qarl.model_folder import meta_model
from tests.support.plan_models import QWEN2_5_7B, QWEN3_30B_A3B, config_of, shapes


def test_qwen2_5_7b_by_hand() -> None:
    model = shapes(QWEN2_5_7B)
    assert model.parameters == 7_615_616_512  # "7.61B"
    assert model.parameters - 2 * model.embedding == 6_525_621_760  # "6.53B" without the embedding and its untied head
    per_layer = 2 * 3584**2 + 2 * 512 * 3584 + 3 * 18944 * 3584
    linear = sum(m.numel for m in model.matrices if m.name != "lm_head")
    assert linear == 28 * per_layer == 6_525_288_448
    assert model.active_parameters == model.parameters
    assert model.kv_bytes == 2 * 28 * 4 * 128 * 2 == 57_344
    assert (model.head.n, model.head.k, model.tied, model.head_norms) == (152064, 3584, False, False)


def test_qwen3_30b_a3b_by_hand() -> None:
    model = shapes(QWEN3_30B_A3B)
    assert model.parameters == 30_532_122_624  # "30.5B"
    assert model.parameters - 2 * model.embedding == 29_909_792_768  # "29.9B"
    # each of 48 layers leaves 120 of 128 experts of three 768 x 2048 matrices unused
    assert model.active_parameters == 30_532_122_624 - 48 * 120 * 3 * 768 * 2048 == 3_353_032_704  # "3.3B"
    assert model.kv_bytes == 2 * 48 * 4 * 128 * 2 == 98_304  # heads are 128 wide, although 2048 / 32 = 64
    assert (model.intermediate, model.active_experts, model.head_norms) == (8 * 768, 8, True)
    experts = [m for m in model.matrices if "experts" in m.name]
    assert {(m.pattern, m.n, m.k, m.copies, m.active) for m in experts} == {
        ("model.layers.*.mlp.experts.gate_proj", 768, 2048, 128, 8),
        ("model.layers.*.mlp.experts.up_proj", 768, 2048, 128, 8),
        ("model.layers.*.mlp.experts.down_proj", 2048, 768, 128, 8),
    }


def test_experts_that_a_batch_reads() -> None:
    expert = Matrix("e", 1, 1, copies=128, active=8)
    assert expert.touched(1) == pytest.approx(8)
    assert expert.touched(2) == pytest.approx(15.5)  # 128 (1 - (15/16)^2)
    assert expert.touched(16) == pytest.approx(82.4225, abs=1e-4)
    assert Matrix("linear", 1, 1).touched(1) == Matrix("linear", 1, 1).touched(500) == 1


@given(st.integers(1, 64), st.integers(1, 64), st.integers(1, 4096))
def test_a_batch_reads_more_experts_when_it_is_larger_but_never_more_than_there_are(
    active: int, idle: int, tokens: int
) -> None:
    matrix = Matrix("e", 1, 1, copies=active + idle, active=active)
    assert active <= matrix.touched(tokens) * (1 + 1e-12)
    assert matrix.touched(tokens) <= min(matrix.copies, active * tokens) * (1 + 1e-12)
    assert matrix.touched(tokens + 1) >= matrix.touched(tokens)


@pytest.mark.parametrize("kind", ["qwen3", "qwen2", "llama"])
def test_a_meta_model_counts_what_a_real_one_has(kind: str, tiny_models: dict[str, Path]) -> None:
    real = AutoModelForCausalLM.from_pretrained(tiny_models[kind], dtype=torch.bfloat16)
    planned = shapes_of(meta_model(AutoConfig.from_pretrained(tiny_models[kind]), torch.bfloat16))
    assert planned == shapes_of(real)
    assert planned.parameters * planned.dtype_bytes == sum(p.nbytes for p in real.parameters())
    assert planned.tied


def test_experts_of_a_real_model() -> None:
    small = QWEN3_30B_A3B | {"hidden_size": 64, "num_hidden_layers": 2, "num_experts": 4, "num_experts_per_tok": 2}
    small |= {"moe_intermediate_size": 32, "vocab_size": 64, "num_attention_heads": 4, "head_dim": 16}
    real = AutoModelForCausalLM.from_config(config_of(small), dtype=torch.bfloat16)
    assert shapes(small) == shapes_of(real)
    assert sum(m.numel for m in shapes(small).matrices if "experts" in m.name) == sum(
        p.numel() for name, p in real.named_parameters() if "experts" in name
    )


def test_other_architectures_are_refused() -> None:
    with pytest.raises(ModelError, match="plans know decoders with gated MLPs"):
        shapes({"model_type": "gpt2", "n_embd": 64, "n_layer": 1, "n_head": 2})
    with pytest.raises(ModelError, match="plans know decoders with gated MLPs"):
        shapes({"model_type": "gpt_neox", "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2})
    with pytest.raises(ModelError, match="t5 is not a model of text alone"):
        meta_model(AutoConfig.for_model("t5"), torch.bfloat16)

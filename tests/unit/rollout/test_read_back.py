"""What the read-back multiplies, and to which layer of the engine a published tensor belongs."""

from __future__ import annotations

import pytest
import torch

from launch.tools.plan.speed import READ_BACK_ROWS
from qarl.quant.int8 import quantize_weight, w8a8_forward
from rollout.read_back import ROWS, _layer_of, _rows


@pytest.mark.parametrize("inputs", [1, 64, 128, 192, 1000])
def test_every_input_is_in_one_row(inputs: int) -> None:
    x_MK = _rows(inputs)
    assert x_MK.shape == (min(ROWS, inputs), inputs)
    assert x_MK.abs().sum(0).tolist() == [1.0] * inputs
    assert x_MK.abs().sum(1).max() <= -(-inputs // ROWS)
    assert torch.equal(x_MK, _rows(inputs))


def test_the_lowest_bit_of_a_weight_nearly_always_shows_in_bfloat16() -> None:
    torch.manual_seed(0)
    q_NK, scale_N1 = quantize_weight(torch.randn(32, 512).bfloat16())
    x_MK = _rows(512).bfloat16()
    before, seen = w8a8_forward(x_MK, q_NK, scale_N1, None), 0
    for flat in torch.randint(0, q_NK.numel(), (300,)).tolist():
        changed = q_NK.clone()
        changed.view(-1)[flat] ^= 1
        seen += not torch.equal(w8a8_forward(x_MK, changed, scale_N1, None), before)
    assert seen > 0.97 * 300


@pytest.mark.parametrize(
    ("tensor", "layer"),
    [
        ("model.layers.3.self_attn.k_proj.weight_scale", "model.layers.3.self_attn.qkv_proj"),
        ("model.layers.3.mlp.up_proj.weight_packed", "model.layers.3.mlp.gate_up_proj"),
        ("model.layers.3.mlp.down_proj.bias", "model.layers.3.mlp.down_proj"),
        ("model.layers.3.mlp.experts.7.up_proj.weight", "model.layers.3.mlp.experts.routed_experts"),
        ("model.layers.3.mlp.gate.weight", "model.layers.3.mlp.gate"),
        ("model.norm.weight", "model.norm"),
        ("lm_head.weight", "lm_head"),
    ],
)
def test_a_tensor_belongs_to_the_engines_fused_layer(tensor: str, layer: str) -> None:
    assert _layer_of(tensor) == layer


def test_the_plan_counts_the_rows_that_are_read_back() -> None:
    assert READ_BACK_ROWS == ROWS

"""What the read-back multiplies, and to which layer of the engine a published tensor belongs."""

from __future__ import annotations

import pytest
import torch

from launch.tools.plan.speed import READ_BACK_ROWS
from qarl.quant.int8 import quantize_weight, w8a8_forward
from qarl.weights.source import Manifest
from qarl.weights.wire import make_manifest
from rollout.read_back import ROWS, Selection, _layer_of, _rows


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


LAYERS = [f"model.layers.{layer}.{part}" for layer in range(5) for part in ("input_layernorm", "mlp.down_proj")]


def manifest(changed: str = "") -> Manifest:
    names = [f"{layer}.{kind}" for layer in LAYERS for kind in ("weight", "weight_scale")]
    return make_manifest(1, "none", [(name, "new" if name == changed else "old") for name in names])


@pytest.mark.parametrize("every", [1, 3, 8, 20])
def test_every_layer_has_its_turn(every: int) -> None:
    shares = [Selection(manifest(), every, turn).layers(manifest()) for turn in range(every)]
    assert sorted(layer for share in shares for layer in share) == sorted(LAYERS)
    assert all(len(share) <= -(-len(LAYERS) // every) for share in shares)


@pytest.mark.parametrize("turn", range(8))
def test_a_layer_that_changed_is_read_in_any_turn(turn: int) -> None:
    others = Selection(manifest(), 8, turn).layers(manifest())
    now = manifest(changed=f"{LAYERS[5]}.weight_scale")
    assert Selection(manifest(), 8, turn).layers(now) == others | {LAYERS[5]}


def test_a_layer_with_fewer_or_more_tensors_has_changed() -> None:
    whole = manifest()
    fewer = make_manifest(2, "none", whole.tensors[:-1])
    assert LAYERS[-1] in Selection(whole, 8, 0).layers(fewer)
    assert LAYERS[-1] in Selection(fewer, 8, 0).layers(whole)

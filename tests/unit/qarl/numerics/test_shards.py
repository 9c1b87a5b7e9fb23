"""Layers that a tensor-parallel engine divides by inputs: slices rounded and multiplied apart, and added."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qarl.numerics import engine_ops
from qarl.numerics.dense import DenseLinear
from qarl.numerics.processor import round_as_engine
from qarl.numerics.shards import all_reduce, shards_of
from qarl.quant.formats import format_of
from qarl.quant.int8 import quantize_weight, w8a8_forward
from qarl.quant.kernels import choose_kernel
from qarl.quant.linear import QuantizedLinear, align_linears, quantized_linears, switch_scheme
from qarl.quant.scheme import QuantScheme
from tests.support.numerics_models import tiny_model

CPU = torch.device("cpu")
DTYPES = (torch.bfloat16, torch.float32)
needs_vllm = pytest.mark.skipif(not engine_ops.available(), reason="vLLM is not installed")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shards", [2, 4])
def test_each_slice_has_its_own_scales_and_rounding(shards: int, dtype: torch.dtype) -> None:
    torch.manual_seed(shards)
    linear = nn.Linear(256, 48).to(dtype)
    x_MK = (torch.randn(40, 256) * torch.linspace(0.1, 8, 256)).to(dtype).requires_grad_()  # slices of other magnitudes
    kernel = choose_kernel(format_of(QuantScheme()), CPU, dtype, "torch")
    layer = QuantizedLinear(linear, "o_proj", format_of(QuantScheme()), kernel, shards=shards)
    q_NK, scale_N1 = quantize_weight(linear.weight.detach())
    slices = zip(x_MK.detach().chunk(shards, 1), q_NK.chunk(shards, 1), strict=True)
    parts = [(x.contiguous(), q.contiguous()) for x, q in slices]
    biases = [layer.bias.detach(), *[None] * (shards - 1)]
    products = [w8a8_forward(x, q, scale_N1, bias).float() for (x, q), bias in zip(parts, biases, strict=True)]
    assert torch.equal(layer(x_MK), round_as_engine(sum(products[1:], products[0]), dtype))
    whole = QuantizedLinear(linear, "o_proj", format_of(QuantScheme()), kernel)
    assert not torch.equal(layer(x_MK), whole(x_MK))

    grad = torch.randn(40, 48).to(dtype)
    inputs = [x_MK, linear.weight, linear.bias]
    ours, theirs = (torch.autograd.grad(one(x_MK), inputs, grad) for one in (layer, whole))
    assert all(map(torch.equal, ours, theirs))  # straight through, as ever


@needs_vllm
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_dense_layer_adds_the_products_of_its_slices(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(128, 64).to(dtype), torch.randn(3, 50, 128).to(dtype)
    left, right = (nn.Linear(64, 64, bias=bias).to(dtype) for bias in (True, False))
    with torch.no_grad():
        for part, weight in zip((left, right), linear.weight.chunk(2, 1), strict=True):
            part.weight.copy_(weight)
        left.bias.copy_(linear.bias)
        products = [DenseLinear(part)(half) for part, half in zip((left, right), x.chunk(2, -1), strict=True)]
        expected = round_as_engine(products[0].float() + products[1].float(), dtype)
        assert torch.equal(DenseLinear(linear, 2)(x), expected)
        assert not torch.equal(DenseLinear(linear, 2)(x), DenseLinear(linear)(x))


def test_the_sum_is_rounded_once() -> None:
    one, half_step = torch.tensor([1.0]).bfloat16(), torch.tensor([2**-8]).bfloat16()
    assert all_reduce([one, half_step, half_step]).item() == 1 + 2**-7
    assert (one + half_step + half_step).item() == 1.0
    assert all_reduce([one]) is one


def test_only_layers_behind_divided_ones_are_divided_by_inputs() -> None:
    model = tiny_model("qwen3")
    align_linears(model, QuantScheme(), "torch", shards=2)
    divided = {name.rpartition(".")[2] for name, layer in quantized_linears(model) if layer.shards == 2}
    assert divided == {"o_proj", "down_proj"}
    assert shards_of("model.layers.0.mlp.down_proj", 2) == 2
    assert shards_of("model.layers.0.mlp.up_proj", 2) == 1


def test_layers_stay_divided_in_another_scheme() -> None:
    model, x = tiny_model("qwen3", hidden_size=64, intermediate_size=64), torch.randn(5, 64)
    align_linears(model, QuantScheme(), "torch", shards=2)
    switch_scheme(model, QuantScheme("fp8_channel"), "reference")
    plain = tiny_model("qwen3", hidden_size=64, intermediate_size=64)
    align_linears(plain, QuantScheme("fp8_channel"), "reference")
    divided, whole = (one.model.layers[0].mlp for one in (model, plain))
    assert not torch.equal(divided.down_proj(x), whole.down_proj(x))
    assert torch.equal(divided.up_proj(x), whole.up_proj(x))

"""The float formats on a CUDA device: torch's fp8 GEMMs against their reference, grids against the CPU's."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qarl.errors import KernelError
from qarl.quant.formats import format_of
from qarl.quant.kernels import choose_kernel
from qarl.quant.linear import QuantizedLinear
from qarl.quant.scheme import FloatScheme, QuantScheme, SchemeName

pytestmark = pytest.mark.gpu

KERNELS: list[SchemeName] = ["fp8_tensor", "fp8_channel", "fp8_block", "mxfp4a16", "nvfp4a16"]


def layer_of(name: SchemeName, inputs: int, outputs: int, bias: bool, cuda: torch.device) -> QuantizedLinear:
    """An aligned layer; skips where the device has no such kernel, once the error has said so."""
    torch.manual_seed(0)
    format_ = format_of(QuantScheme(name))
    capability = torch.cuda.get_device_capability()
    if capability != (9, 0) if name == "fp8_block" else name.startswith("fp8") and capability < (8, 9):
        with pytest.raises(KernelError, match=f"this one has {capability[0]}.{capability[1]}"):
            choose_kernel(format_, cuda, torch.bfloat16)
        pytest.skip(f"{name} has no kernel on this device")
    linear = nn.Linear(inputs, outputs, bias=bias).bfloat16().to(cuda)
    return QuantizedLinear(linear, "layer", format_, choose_kernel(format_, cuda, torch.bfloat16))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("inputs", "outputs"), [(256, 512), (1024, 384)])
@pytest.mark.parametrize("tokens", [1, 3, 17, 200])
@pytest.mark.parametrize("name", KERNELS)
def test_kernel_computes_its_reference(
    name: SchemeName, tokens: int, inputs: int, outputs: int, bias: bool, cuda: torch.device
) -> None:
    layer = layer_of(name, inputs, outputs, bias, cuda)
    x = (torch.randn(tokens, inputs) * torch.rand(tokens, 1) * 4).bfloat16().to(cuda)
    y = layer(x)
    assert y.dtype == torch.bfloat16
    value = layer.format_.dequantize(layer.quantized()).double()
    exact = F.linear(
        layer.format_.round_activation(x).double(), value, None if layer.bias is None else layer.bias.double()
    )
    # One rounding of the output; Hopper's fp8 tensor cores keep some 14 bits of a partial sum.
    assert (y.double() - exact).abs().max() <= 2**-7 * exact.abs().max()


@pytest.mark.parametrize("name", KERNELS)
def test_gradient_is_straight_through(name: SchemeName, cuda: torch.device) -> None:
    layer = layer_of(name, 256, 128, True, cuda)
    x = torch.randn(2, 5, 256, device=cuda).bfloat16().requires_grad_()
    leaves = [x, layer.weight, layer.bias]
    upstream = torch.randn(2, 5, 128, device=cuda).bfloat16()
    grads = torch.autograd.grad(layer(x), leaves, upstream)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    for grad, want in zip(grads, torch.autograd.grad(F.linear(*exact), exact, upstream.double()), strict=True):
        torch.testing.assert_close(grad.double(), want, rtol=2**-7, atol=want.abs().max().item() * 2**-7)


@pytest.mark.parametrize("name", get_args(FloatScheme))
def test_grids_are_the_cpus_bit_for_bit(name: SchemeName, cuda: torch.device) -> None:
    format_ = format_of(QuantScheme(name))
    weight = torch.randn(256, 384, generator=torch.manual_seed(0)).bfloat16()
    weight[:, 0], weight[1] = -0.0, 1e-39
    here, there = format_.quantize(weight), format_.quantize(weight.to(cuda))
    for key, tensor in here.items():
        assert torch.equal(there[key].cpu().view(torch.uint8), tensor.view(torch.uint8)), key
    assert torch.equal(format_.dequantize(there).cpu(), format_.dequantize(here))
    assert torch.equal(format_.round_activation(weight.to(cuda)).cpu(), format_.round_activation(weight))


@pytest.mark.parametrize("name", ["fp8_tensor", "fp8_channel"])
def test_shape_that_the_kernel_does_not_take(name: SchemeName, cuda: torch.device) -> None:
    layer = layer_of(name, 64, 24, False, cuda)
    with pytest.raises(KernelError, match="needs K and N divisible by 16, got K=64 N=24"):
        layer(torch.randn(3, 64, device=cuda).bfloat16())

"""W8A8 on CUDA: the CPU's bits, whatever the shape."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qarl.errors import KernelError
from qarl.quant.int8 import int8_gemm, quantize_activation, quantize_weight, w8a8_forward
from qarl.quant.linear import align_linears, quantized_linears
from qarl.quant.scheme import QuantScheme

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("m", [1, 16, 17, 31, 32, 100])
@pytest.mark.parametrize(("k", "n"), [(16, 8), (64, 72), (4096, 128)])
def test_gemm_is_exact(m: int, k: int, n: int, cuda: torch.device) -> None:
    """Up to 16 rows are padded: cuBLASLt takes no fewer than 17."""
    generator = torch.manual_seed(m)
    q_x_MK = torch.randint(-127, 128, (m, k), dtype=torch.int8, generator=generator)
    q_w_NK = torch.randint(-128, 128, (n, k), dtype=torch.int8, generator=generator)
    q_x_MK[0], q_w_NK[0] = 127, -128  # the largest sum there is
    out_MN = int8_gemm(q_x_MK.to(cuda), q_w_NK.to(cuda))
    assert out_MN.dtype == torch.int32
    assert torch.equal(out_MN.cpu().long(), q_x_MK.long() @ q_w_NK.long().t())


@pytest.mark.parametrize(("k", "n"), [(60, 64), (64, 60)])
def test_shapes_without_a_kernel_are_named(k: int, n: int, cuda: torch.device) -> None:
    x, weight = torch.zeros(32, k, dtype=torch.int8, device=cuda), torch.zeros(n, k, dtype=torch.int8, device=cuda)
    with pytest.raises(KernelError, match=rf"divisible by 8, got K={k} N={n}; add the layer to rollout.ignore"):
        int8_gemm(x, weight)


def case(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Activations [40, 256] of many sizes, one row of zeros; a weight [128, 256]."""
    generator = torch.manual_seed(0)
    x_MK = torch.randn(40, 256, generator=generator) * 10.0 ** torch.linspace(-6, 6, 40)[:, None]
    x_MK[7] = 0.0
    return x_MK.to(dtype), torch.randn(128, 256, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grids_are_the_cpus_bit_for_bit(dtype: torch.dtype, cuda: torch.device) -> None:
    x_MK, weight_NK = case(dtype)
    for quantize, tensor in ((quantize_activation, x_MK), (quantize_weight, weight_NK)):
        for ours, expected in zip(quantize(tensor.to(cuda)), quantize(tensor), strict=True):
            assert torch.equal(ours.cpu(), expected)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layer_is_the_cpus_bit_for_bit(dtype: torch.dtype, bias: bool, cuda: torch.device) -> None:
    x_MK, weight_NK = case(dtype)
    bias_N = torch.randn(128, generator=torch.manual_seed(1)).to(dtype) if bias else None
    q_NK, scale_N1 = quantize_weight(weight_NK)
    expected = w8a8_forward(x_MK, q_NK, scale_N1, bias_N)
    on_gpu = [None if t is None else t.to(cuda) for t in (q_NK, scale_N1, bias_N)]
    assert torch.equal(w8a8_forward(x_MK.to(cuda), *on_gpu).cpu(), expected)


def test_aligned_model_takes_the_int8_gemm_and_its_gradient_is_straight_through(cuda: torch.device) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32)).bfloat16().to(cuda)
    align_linears(model, QuantScheme(ignore=()))
    ((_, layer),) = quantized_linears(model)
    assert layer.kernel.name == "torch._int_mm"
    x = torch.randn(6, 64, device=cuda, dtype=torch.bfloat16, requires_grad=True)
    upstream = torch.randn(6, 32, device=cuda, dtype=torch.bfloat16)
    leaves = [x, layer.weight, layer.bias]
    grads = torch.autograd.grad(model(x), leaves, upstream)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = torch.autograd.grad(nn.functional.linear(*exact), exact, upstream.double())
    for grad, want in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad.double(), want, rtol=2**-7, atol=want.abs().max().item() * 2**-8)

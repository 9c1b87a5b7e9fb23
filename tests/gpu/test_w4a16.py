"""W4A16 on CUDA: Triton's kernel and torch's dequantized product against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qarl.errors import KernelError
from qarl.quant import int4
from qarl.quant.formats import format_of
from qarl.quant.kernels import Kernel, choose_kernel
from qarl.quant.linear import QuantizedLinear
from qarl.quant.scheme import KernelKind, QuantScheme

pytestmark = pytest.mark.gpu

KINDS: tuple[KernelKind, ...] = ("triton", "torch")


def kernel_of(kind: KernelKind, group: int, device: torch.device) -> Kernel:
    scheme = QuantScheme("w4a16", group_size=group)
    return choose_kernel(format_of(scheme), device, torch.bfloat16, kind)


def random(*shape: int, device: torch.device) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).bfloat16().to(device)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize(("m", "k", "n"), [(1, 128, 128), (17, 384, 72), (130, 4096, 200), (1000, 1024, 33)])
def test_kernel_rounds_the_exact_product_once(
    kind: KernelKind, bias: bool, group: int, m: int, k: int, n: int, cuda: torch.device
) -> None:
    """Exact but for float32 sums that lie near a rounding boundary of bfloat16, or cancel."""
    x_MK, weight_NK = random(m, k, device=cuda), random(n, k, device=cuda)
    bias_N = random(n, device=cuda) if bias else None
    kernel, format_ = kernel_of(kind, group, cuda), format_of(QuantScheme("w4a16", group_size=group))
    quantized = format_.quantize(weight_NK)
    y_MN = kernel.forward(x_MK, kernel.prepare(quantized, bias_N))
    exact_MN = x_MK.double() @ format_.dequantize(quantized).bfloat16().double().t()
    if bias_N is not None:
        exact_MN += bias_N.double()
    assert y_MN.dtype == torch.bfloat16
    assert y_MN.shape == (m, n)
    largest = exact_MN.abs().amax()
    torch.testing.assert_close(y_MN.double(), exact_MN, rtol=2**-8, atol=float(largest) * 2**-20)
    assert (y_MN != exact_MN.float().bfloat16()).float().mean() < 5e-3


@pytest.mark.parametrize("group", [32, 128])
def test_quantized_weight_is_the_cpus_bit_for_bit(group: int, cuda: torch.device) -> None:
    weight_NK = random(64, 256, device=torch.device("cpu"))
    format_ = format_of(QuantScheme("w4a16", group_size=group))
    ours, expected = format_.quantize(weight_NK.to(cuda)), format_.quantize(weight_NK)
    for name, tensor in expected.items():
        assert torch.equal(ours[name].cpu(), tensor), name
    assert torch.equal(int4.unpack(ours["weight_packed"]).cpu(), int4.unpack(expected["weight_packed"]))


def test_a_batch_wider_than_int32_offsets(cuda: torch.device) -> None:
    """2^31 activations: 4 GiB, and the outputs."""
    m, k, n = 2**16 + 1, 2**15, 32
    if torch.cuda.mem_get_info()[0] < 8 * 2**30:
        pytest.skip("needs 8 GiB of free GPU memory")
    kernel, format_ = kernel_of("triton", 128, cuda), format_of(QuantScheme("w4a16", group_size=128))
    prepared = kernel.prepare(format_.quantize(random(n, k, device=cuda)), None)
    x_MK = torch.zeros(m, k, dtype=torch.bfloat16, device=cuda)
    x_MK[-1] = random(k, device=cuda)
    y_MN = kernel.forward(x_MK, prepared)
    assert not y_MN[:-1].any()
    assert torch.equal(y_MN[-1:], kernel.forward(x_MK[-1:], prepared))
    assert y_MN[-1].any()


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_is_straight_through(kind: KernelKind, cuda: torch.device) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(128, 32).bfloat16().to(cuda)
    layer = QuantizedLinear(linear, "layer", format_of(QuantScheme("w4a16")), kernel_of(kind, 128, cuda))
    x, upstream = random(2, 3, 128, device=cuda).requires_grad_(), random(2, 3, 32, device=cuda)
    leaves = [x, layer.weight, layer.bias]
    grads = torch.autograd.grad(layer(x), leaves, upstream)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = torch.autograd.grad(nn.functional.linear(*exact), exact, upstream.double())
    for grad, want in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad.double(), want, rtol=2**-7, atol=want.abs().max().item() * 2**-8)


def test_the_choice_is_triton_and_bfloat16(cuda: torch.device) -> None:
    scheme = QuantScheme("w4a16")
    assert choose_kernel(format_of(scheme), cuda, torch.bfloat16).name == "triton W4A16"
    with pytest.raises(KernelError, match="computes in bfloat16"):
        choose_kernel(format_of(scheme), cuda, torch.float32)

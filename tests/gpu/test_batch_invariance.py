"""On CUDA a token has the same bits in any batch, as far as it goes through kernels of our own choice."""

from __future__ import annotations

import pytest
import torch

from qarl.numerics.layers import Rotate
from qarl.quant.formats import format_of
from qarl.quant.kernels import choose_kernel
from qarl.quant.scheme import QuantScheme

pytestmark = pytest.mark.gpu

SCHEMES = [QuantScheme("w8a8_int8"), *(QuantScheme("w4a16", group_size=group) for group in (32, 128))]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: f"{scheme.name}-{scheme.group_size}")
@pytest.mark.parametrize(("k", "n"), [(256, 512), (1024, 72), (4096, 4096)])
def test_low_bit_linear(scheme: QuantScheme, k: int, n: int, bias: bool, cuda: torch.device) -> None:
    generator = torch.Generator(cuda).manual_seed(0)
    x_MK = torch.randn(1000, k, generator=generator, device=cuda).bfloat16()
    weight_NK = torch.randn(n, k, generator=generator, device=cuda).bfloat16()
    bias_N = torch.randn(n, generator=generator, device=cuda).bfloat16() if bias else None
    format_ = format_of(scheme)
    kernel = choose_kernel(format_, cuda, torch.bfloat16)
    prepared = kernel.prepare(format_.quantize(weight_NK), bias_N)
    whole_MN = kernel.forward(x_MK, prepared)
    for rows in (slice(0, 1), slice(999, 1000), slice(3, 20), slice(100, 228), slice(5, 700)):
        assert torch.equal(kernel.forward(x_MK[rows], prepared), whole_MN[rows]), rows


def test_rotation(cuda: torch.device) -> None:
    generator = torch.Generator(cuda).manual_seed(0)
    x_BTHD = torch.randn(9, 70, 3, 64, generator=generator, device=cuda).bfloat16()
    angle_BTD = torch.rand(9, 70, 32, generator=generator, device=cuda)
    cos_BTD, sin_BTD = angle_BTD.cos().bfloat16(), angle_BTD.sin().bfloat16()
    whole = Rotate.apply(x_BTHD, cos_BTD, sin_BTD)
    assert torch.equal(Rotate.apply(x_BTHD[4:5], cos_BTD[4:5], sin_BTD[4:5]), whole[4:5])

"""fp8 grids against compressed-tensors, bit for bit; the GEMM against exact arithmetic; what CUDA devices are told."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from compressed_tensors.quantization.lifecycle.forward import quantize
from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qarl.errors import KernelError
from qarl.quant import fp8
from qarl.quant.format import LearnerKernel
from qarl.quant.formats import format_of
from qarl.quant.kernels import check_capability, find_kernel
from qarl.quant.scheme import QuantScheme, SchemeName
from tests.support.float_weights import KINDS, as_bytes, float_weight

SHAPE = (40, 256)


def library(preset: str, weight: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """compressed-tensors' own fp8 weight and scale."""
    args = preset_name_to_scheme(preset, ["Linear"]).weights
    scale, zero = calculate_qparams(low, high, args)
    return quantize(weight, scale, zero, args, dtype=torch.float8_e4m3fn), scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(seed=st.integers(0, 2**32), kind=st.sampled_from(KINDS))
def test_weight_grids_are_the_librarys_bit_for_bit(seed: int, kind: str, dtype: torch.dtype) -> None:
    weight = float_weight(seed, kind, SHAPE).to(dtype)
    w = weight.float()
    blocks = F.pad(w, (0, 0, 0, 128 - SHAPE[0])).view(1, 128, 2, 128)
    pairs = [
        (fp8.quantize_channels(weight), library("FP8_DYNAMIC", w, w.amin(1, True), w.amax(1, True))),
        (fp8.quantize_tensor(weight), library("FP8", w, w.amin(), w.amax())),
        (fp8.quantize_blocks(weight), library("FP8_BLOCK", w, blocks.amin((1, 3)), blocks.amax((1, 3)))),
    ]
    for (q, scale), (expected_q, expected_scale) in pairs:
        assert torch.equal(as_bytes(q), as_bytes(expected_q))
        assert torch.equal(scale, expected_scale)


def test_a_shared_magnitude_sets_the_scale_of_a_tensor() -> None:
    q, scale = fp8.quantize_tensor(torch.tensor([[1.0, -2.0]]), torch.tensor(448.0))
    assert scale.tolist() == [1.0]
    assert q.float().tolist() == [[1.0, -2.0]]


@pytest.mark.parametrize("group", [False, True])
def test_activations_are_recovered_within_half_a_step(group: bool) -> None:
    x = torch.randn(9, 256, generator=torch.manual_seed(0)) * torch.logspace(-2, 6, 9)[:, None]
    x[3] = 0.0
    if group:
        value = fp8.dequantize(*fp8.quantize_activation_groups(x), columns=fp8.BLOCK)
        largest = x.view(9, 2, 128).abs().amax(2).repeat_interleave(128, 1)
    else:
        value, largest = fp8.dequantize(*fp8.quantize_activation(x)), x.abs().amax(1, keepdim=True)
    # 3 bits of mantissa; below 2^-6 of the scale fixed steps of 2^-9
    assert ((value - x).abs() <= x.abs() * 2**-4 + largest / 448 * 2**-10).all()
    assert not value[3].any()


@pytest.mark.parametrize("k", [192, 2048])
def test_gemm_is_its_reference_and_knows_no_batch(k: int) -> None:
    generator = torch.Generator().manual_seed(k)
    x = torch.randn(70, k, generator=generator) * torch.rand(70, 1, generator=generator)
    q_NK, scale_N1 = fp8.quantize_channels(torch.randn(48, k, generator=generator))
    bias_N = torch.randn(48, generator=generator)
    y = fp8.w8a8_forward(x, q_NK, scale_N1, bias_N)
    q_x, scale_x = fp8.quantize_activation(x)
    exact = (q_x.double() @ q_NK.double().t()) * scale_x * scale_N1.t() + bias_N
    assert (y - exact).abs().max() <= 1e-6 * exact.abs().max()
    for rows in (slice(0, 1), slice(3, 8), slice(20, 60)):
        assert torch.equal(fp8.w8a8_forward(x[rows], q_NK, scale_N1, bias_N), y[rows])


def test_onednn_is_off_only_within() -> None:
    before = torch._C._get_mkldnn_enabled()
    with fp8.without_onednn():
        assert not torch._C._get_mkldnn_enabled()
    assert torch._C._get_mkldnn_enabled() == before


def cuda_kernel(name: SchemeName) -> LearnerKernel:
    return find_kernel(format_of(QuantScheme(name)), "cuda", torch.bfloat16)


@pytest.mark.parametrize(
    ("scheme", "capability", "message"),
    [
        ("fp8_channel", 80, "rollout.scheme: torch's fp8_channel .* 8.9 or more, this one has 8.0; take w8a8_int8"),
        ("fp8_tensor", 86, "take w8a8_int8 or w4a16 there"),
        ("fp8_block", 80, "capability 9.0, this one has 8.0; take w8a8_int8 or w4a16 there"),
        ("fp8_block", 89, "capability 9.0, this one has 8.9; take fp8_channel there"),
        ("fp8_block", 100, "this one has 10.0; take fp8_channel there"),
    ],
)
def test_fp8_on_a_device_without_it(scheme: SchemeName, capability: int, message: str) -> None:
    with pytest.raises(KernelError, match=message):
        check_capability(scheme, cuda_kernel(scheme), capability)


def test_fp8_on_cuda_wants_bfloat16_and_multiples_of_16() -> None:
    check_capability("fp8_channel", cuda_kernel("fp8_channel"), 89)
    check_capability("fp8_block", cuda_kernel("fp8_block"), 90)
    with pytest.raises(KernelError, match="computes in bfloat16; set model"):
        find_kernel(format_of(QuantScheme("fp8_channel")), "cuda", torch.float32)
    with pytest.raises(KernelError, match="divisible by 16, got K=40 N=32; add the layer"):
        fp8.check_cuda_shape(torch.empty(32, 40))

"""The int8 grids and the GEMM, against a library and exact arithmetic."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import quantize
from compressed_tensors.quantization.utils import calculate_qparams
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from torch import Tensor

from qarl.errors import KernelError
from qarl.numerics import processor
from qarl.quant.int8 import int8_gemm, quantize_activation, quantize_weight, w8a8_forward

CHANNEL = QuantizationArgs(num_bits=8, symmetric=True, strategy="channel")
MATRICES = arrays(
    np.float32,
    array_shapes(min_dims=2, max_dims=2, max_side=6),
    # Just under float32's largest: it must stay finite in bfloat16. Subnormals are drawn.
    elements=st.floats(-(2.0**127), 2.0**127, width=32) | st.sampled_from([0.0, 127.5, -0.5, 1e-45, 1e-38]),
)


def library_grid(weight_NK: Tensor) -> tuple[Tensor, Tensor]:
    """compressed-tensors' own int8 weight and scale."""
    weight = weight_NK.float()
    scale, zero = calculate_qparams(weight.amin(1, keepdim=True), weight.amax(1, keepdim=True), CHANNEL)
    return quantize(weight, scale, zero, CHANNEL, dtype=torch.int8), scale


def assert_library_grid(weight_NK: Tensor) -> None:
    q_NK, scale_N1 = quantize_weight(weight_NK)
    expected_q, expected_scale = library_grid(weight_NK)
    assert q_NK.dtype == torch.int8
    assert scale_N1.dtype == torch.float32
    assert torch.equal(scale_N1, expected_scale)
    assert torch.equal(q_NK, expected_q)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(matrix=MATRICES)
@settings(max_examples=60, deadline=None)
def test_weight_grid_is_the_librarys(matrix: np.ndarray, dtype: torch.dtype) -> None:
    assert_library_grid(torch.from_numpy(matrix).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1e-45, 1e-42, 1e-38, 1e-6, 1.0, 1e30])
def test_weight_grid_is_the_librarys_at_every_size(size: float, dtype: torch.dtype) -> None:
    weight_NK = torch.randn(64, 96, generator=torch.manual_seed(0)) * size
    weight_NK[3] = 0.0
    assert_library_grid(weight_NK.to(dtype))


def test_zero_channel_stays_zero() -> None:
    q_NK, scale_N1 = quantize_weight(torch.zeros(2, 4))
    assert not q_NK.any()
    assert scale_N1.flatten().tolist() == [torch.finfo(torch.float32).eps] * 2


@given(matrix=arrays(np.float32, (3, 5), elements=st.integers(-(10**5), 10**5).map(lambda i: i / 1024)))
@settings(deadline=None)
def test_weight_is_recovered_within_half_a_step(matrix: np.ndarray) -> None:
    q_NK, scale_N1 = quantize_weight(torch.from_numpy(matrix))
    error = (q_NK.double() * scale_N1.double() - torch.from_numpy(matrix).double()).abs()
    # The largest positive value is 127.5 steps: clamped to 127 it is half a step off, like any other.
    assert (error <= scale_N1.double() * (0.5 + 1e-4)).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_broken_weight_names_its_rows(value: float) -> None:
    weight_NK = torch.ones(5, 3)
    weight_NK[1, 2] = weight_NK[4, 0] = value
    with pytest.raises(KernelError, match=r"rows \[1, 4\]"):
        quantize_weight(weight_NK)


def test_activation_grid() -> None:
    x_MK = torch.randn(50, 33, generator=torch.manual_seed(0)) * 10.0 ** torch.arange(-25, 25)[:, None]
    x_MK[7] = 0.0
    q_MK, scale_M1 = quantize_activation(x_MK)
    x = x_MK.numpy()
    scale = np.abs(x).max(1, keepdims=True) / np.float32(127)
    inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale > 0)
    np.testing.assert_array_equal(scale_M1.numpy(), scale)
    np.testing.assert_array_equal(q_MK.numpy(), np.rint(x * inverse))
    assert not q_MK[7].any()
    assert scale_M1[7] == 0.0


def test_activation_is_multiplied_by_the_reciprocal() -> None:
    x_MK = torch.randn(200, 200, generator=torch.manual_seed(0)).round(decimals=3)
    q_MK, scale_M1 = quantize_activation(x_MK)
    flipped = q_MK != (x_MK / scale_M1).round().to(torch.int8)
    assert 0 < flipped.sum() < 1e-2 * flipped.numel()


@pytest.mark.parametrize(("m", "k", "n"), [(1, 8, 8), (3, 7, 5), (17, 64, 9), (2, 4096, 3)])
def test_gemm_is_exact(m: int, k: int, n: int) -> None:
    generator = torch.manual_seed(m)
    q_x_MK = torch.randint(-127, 128, (m, k), dtype=torch.int8, generator=generator)
    q_w_NK = torch.randint(-128, 128, (n, k), dtype=torch.int8, generator=generator)
    q_x_MK[0], q_w_NK[0] = 127, -128  # the largest sum there is
    out_MN = int8_gemm(q_x_MK, q_w_NK)
    assert out_MN.dtype == torch.int32
    assert torch.equal(out_MN.long(), q_x_MK.long() @ q_w_NK.long().t())


@pytest.mark.parametrize("k", [1, 1023, 1024, 1025, 2048, 5000])
def test_gemm_of_float32_copies_is_exact(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of processors without VNNI, at the largest sums that there are."""
    monkeypatch.setattr(processor, "has_vnni", lambda: False)
    monkeypatch.setattr(torch, "_int_mm", None)
    generator = torch.manual_seed(k)
    q_x_MK = torch.randint(-128, 128, (5, k), dtype=torch.int8, generator=generator)
    q_w_NK = torch.randint(-128, 128, (4, k), dtype=torch.int8, generator=generator)
    q_x_MK[0] = q_w_NK[0] = -128
    q_x_MK[1] = q_w_NK[1] = 127
    q_x_MK[2, -1] -= 1
    out_MN = int8_gemm(q_x_MK, q_w_NK)
    assert out_MN.dtype == torch.int32
    assert torch.equal(out_MN.long(), q_x_MK.long() @ q_w_NK.long().t())


def nearest_float32(exact: Fraction) -> np.float32:
    """`exact` rounded once."""
    guess = np.float32(float(exact))
    candidates = [guess, np.nextafter(guess, np.float32(np.inf)), np.nextafter(guess, np.float32(-np.inf))]
    return min(candidates, key=lambda c: abs(Fraction(float(c)) - exact))


def linear_case(dtype: torch.dtype, bias: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """x [6, 40], weight [9, 40] and bias [9]."""
    generator = torch.manual_seed(3)
    x_MK = torch.randn(6, 40, generator=generator) * 10.0 ** torch.arange(-3, 3)[:, None]
    x_MK[4] = 0.0
    bias_N = torch.randn(9, generator=generator).to(dtype) if bias else None
    return x_MK.to(dtype), torch.randn(9, 40, generator=generator).to(dtype), bias_N


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_rounds_as_documented(dtype: torch.dtype, bias: bool) -> None:
    x_MK, weight_NK, bias_N = linear_case(dtype, bias)
    q_w, s_w = (t.numpy() for t in quantize_weight(weight_NK))
    q_x, s_x = (t.numpy() for t in quantize_activation(x_MK))
    first_MN = (q_x.astype(np.int64) @ q_w.T.astype(np.int64)).astype(np.float32) * s_w.T
    expected_MN = np.empty_like(first_MN)
    for m, n in np.ndindex(*first_MN.shape):
        product = Fraction(float(first_MN[m, n])) * Fraction(float(s_x[m, 0]))
        expected_MN[m, n] = nearest_float32(product + Fraction(0.0 if bias_N is None else bias_N[n].item()))
    out_MN = w8a8_forward(x_MK, torch.from_numpy(q_w), torch.from_numpy(s_w), bias_N)
    assert torch.equal(out_MN, torch.from_numpy(expected_MN).to(dtype))


@pytest.mark.parametrize("bias", [False, True])
def test_forward_approaches_the_plain_linear(bias: bool) -> None:
    x_MK, weight_NK, bias_N = linear_case(torch.float32, bias)
    out_MN = w8a8_forward(x_MK, *quantize_weight(weight_NK), bias_N)
    plain_MN = F.linear(x_MK, weight_NK, bias_N)
    # Each of 40 products carries two roundings of up to half a step, 1/254 of its row's largest value.
    bound_MN = 40 * x_MK.abs().amax(1, keepdim=True) * weight_NK.abs().amax(1) * 2 / 254
    assert ((out_MN - plain_MN).abs() <= bound_MN * 1.01).all()
    assert torch.equal(out_MN[4], plain_MN[4])  # a zero token gives the bias

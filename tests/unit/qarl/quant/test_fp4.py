"""fp4 grids and packing against compressed-tensors, bit for bit; rounding against the e2m1 values themselves."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from compressed_tensors.compressors.mxfp4.base import MXFP4PackedCompressor
from compressed_tensors.compressors.nvfp4.base import NVFP4PackedCompressor
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams, compute_dynamic_scales_and_zp, generate_gparam
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qarl.errors import KernelError
from qarl.quant import fp4
from tests.support.float_weights import KINDS, as_bytes, float_weight

SHAPE = (12, 96)
MX, NV = (preset_name_to_scheme(name, ["Linear"]) for name in ("MXFP4", "NVFP4"))


@pytest.fixture(scope="module", autouse=True)
def uncompiled_library() -> Iterator[None]:
    """The library compiles its rounding, which takes longer than all tests here."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


def library_mx(weight: Tensor) -> dict[str, Tensor]:
    groups = weight.unflatten(1, (-1, 32))
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), MX.weights)
    state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}
    return dict(MXFP4PackedCompressor.compress(state, MX))


def library_nv(weight: Tensor, amax: Tensor) -> dict[str, Tensor]:
    groups = weight.unflatten(1, (-1, 16))
    one = generate_gparam(-amax, amax)
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), NV.weights, global_scale=one)
    state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero, "weight_global_scale": one}
    return dict(NVFP4PackedCompressor.compress(state, NV))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(seed=st.integers(0, 2**32), kind=st.sampled_from(KINDS))
def test_mxfp4_weight_is_the_librarys_bit_for_bit(seed: int, kind: str, dtype: torch.dtype) -> None:
    weight = float_weight(seed, kind, SHAPE).to(dtype)
    packed, exponent = fp4.quantize_mx(weight)
    expected = library_mx(weight)
    assert torch.equal(packed, expected["weight_packed"])
    assert torch.equal(exponent, expected["weight_scale"])


@pytest.mark.parametrize("siblings", [1.0, 7.3])
@given(seed=st.integers(0, 2**32), kind=st.sampled_from(KINDS))
def test_nvfp4_weight_is_the_librarys_bit_for_bit(seed: int, kind: str, siblings: float) -> None:
    """Also with the global scale of larger siblings."""
    weight = float_weight(seed, kind, SHAPE).bfloat16()
    amax = (weight.float().abs().amax() * siblings).clamp(max=3e38)
    packed, scale, one = fp4.quantize_nv(weight, amax)
    expected = library_nv(weight.float(), amax)
    assert torch.equal(packed, expected["weight_packed"])
    assert torch.equal(as_bytes(scale), as_bytes(expected["weight_scale"]))
    assert torch.equal(one, expected["weight_global_scale"])
    if siblings == 1.0:
        assert all(
            torch.equal(as_bytes(a), as_bytes(b))
            for a, b in zip(fp4.quantize_nv(weight), (packed, scale, one), strict=True)
        )


@given(seed=st.integers(0, 2**32), kind=st.sampled_from(KINDS))
def test_mxfp4_activations_are_the_librarys_bit_for_bit(seed: int, kind: str) -> None:
    x = float_weight(seed, kind, SHAPE)
    scale, zero = compute_dynamic_scales_and_zp(x, MX.input_activations, module=torch.nn.Identity())
    assert torch.equal(fp4.round_mx(x), fake_quantize(x, scale, zero, MX.input_activations))


def test_a_weight_beyond_mxfp4_is_an_error() -> None:
    """The library's scale is infinite there, and its bytes wrap around."""
    fp4.quantize_mx(torch.full((1, 32), 2.97e38))
    with pytest.raises(KernelError, match="a weight rounds to infinity in mxfp4"):
        fp4.quantize_mx(torch.full((1, 32), 3e38))


@given(st.lists(st.floats(-7, 7, width=32) | st.sampled_from([0.25, -0.75, 1.25, 1.75, -2.5, 3.5, 5.0]), min_size=1))
def test_a_value_becomes_the_nearest_of_e2m1(values: list[float]) -> None:
    grid = torch.tensor(fp4.VALUES)
    x = torch.tensor(values).clamp(-6, 6)
    codes = fp4.encode(x)
    distance = (x.abs()[:, None] - grid).abs()
    index = (codes & 7).int()
    assert torch.equal(distance.gather(1, index[:, None].long())[:, 0], distance.amin(1))
    tied = (distance == distance.amin(1, keepdim=True)).sum(1) == 2
    assert not (index[tied] % 2).any()  # the even mantissa
    assert torch.equal(codes > 7, x < 0)


def test_first_of_two_values_is_the_low_nibble() -> None:
    codes = torch.arange(16, dtype=torch.uint8).view(1, 1, 16)
    packed = fp4.pack(codes)
    assert packed[0].tolist() == [0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]
    assert torch.equal(as_bytes(fp4.decode(packed)), as_bytes(unpack_fp4_from_uint8(packed, 1, 16, torch.float32)))


def test_known_values() -> None:
    """By hand: amax 6 makes the MX scale 2^0; an NV weight of largest 6 has g = 448 and group scale 448."""
    weight = torch.tensor([[6.0, -4.4, 0.2, -0.2, *[0.0] * 28]])
    packed, exponent = fp4.quantize_mx(weight)
    assert exponent.tolist() == [[127]]
    assert fp4.decode(packed)[0, :4].tolist() == [6.0, -4.0, 0.0, -0.0]
    assert packed[0, :2].tolist() == [0xE7, 0x80]  # 6 is 7, -4 is 14; 0.2 is 0, -0.2 is -0
    packed, scale, one = fp4.quantize_nv(weight)
    assert one.tolist() == [448.0]
    assert scale.float().tolist() == [[448.0, 0.125]]
    assert packed[0, :2].tolist() == [0xE7, 0x80]


def test_nvfp4_activations_keep_zero_and_clip_the_largest() -> None:
    x = torch.zeros(1, 32)
    x[0, 0], x[0, 16] = 1e5, 1e-3
    value = fp4.round_nv(x)
    assert value[0, 0] == 448 * 6  # beyond the static global scale
    assert not value[0, 1:].any()

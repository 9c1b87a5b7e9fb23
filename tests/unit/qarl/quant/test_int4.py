"""int4 grids and packing against compressed-tensors, bit for bit; the W4A8 activation grid against torch's kernel."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
from compressed_tensors.quantization.utils import calculate_qparams
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qarl.quant import int4

BF16_EXTREMES = [0.0, -0.0, 1e-40, -1e-40, 9.2e-41, 3.3e38, -3.3e38, 1.0, -1.0, 2.0**-126, 0.5, 3.0]


def weights(seed: int, kind: str, group: int) -> Tensor:
    """bfloat16 [6, 2 groups] of one kind of values."""
    generator = torch.Generator().manual_seed(seed)
    shape = (6, 2 * group)
    if kind == "zero":
        return torch.zeros(shape, dtype=torch.bfloat16)
    if kind == "extreme":
        picked = torch.randint(len(BF16_EXTREMES), shape, generator=generator)
        return torch.tensor(BF16_EXTREMES)[picked].bfloat16()
    scale = {"random": 1.0, "subnormal": 1e-39, "huge": 1e38}[kind]
    return (torch.randn(shape, generator=generator) * scale).clamp(-3e38, 3e38).bfloat16()


@given(
    seed=st.integers(0, 2**32),
    kind=st.sampled_from(["random", "zero", "extreme", "subnormal", "huge"]),
    group=st.sampled_from([32, 64, 128]),
)
def test_quantized_weight_is_the_librarys_bit_for_bit(seed: int, kind: str, group: int) -> None:
    weight = weights(seed, kind, group)
    args = QuantizationArgs(num_bits=4, symmetric=True, strategy="group", group_size=group)
    grouped = weight.view(6, -1, group)
    scale, zero = calculate_qparams(grouped.amin(-1), grouped.amax(-1), args)
    q_NK, scale_NG = int4.quantize_weight(weight, group)
    assert torch.equal(scale_NG.view(torch.int16), scale.view(torch.int16))
    # The library divides in its input's dtype: the quotient is taken in float32, as llm-compressor's float32 path does.
    library = quantize(weight.float(), scale.float(), zero, args, dtype=torch.int8)
    assert torch.equal(q_NK, library)
    assert torch.equal(int4.pack(q_NK), pack_to_int32(library, 4))
    assert torch.equal(int4.unpack(int4.pack(q_NK)), unpack_from_int32(pack_to_int32(library, 4), 4, weight.shape))
    value = dequantize(library, scale.float(), zero, args)
    assert torch.equal(int4.dequantize(q_NK, scale_NG), value)


def test_the_grid_is_minus_8_to_7_at_amax_over_7_5() -> None:
    """Computed by hand; a GPTQ-style grid would use amax / 7 and never reach -8."""
    weight = torch.zeros(1, 32)
    weight[0, :6] = torch.tensor([7.5, -7.5, 6.6, 0.4, -7.4, 0.5])
    q_NK, scale_NG = int4.quantize_weight(weight, 32)
    assert scale_NG.tolist() == [[1.0]]
    assert q_NK[0, :6].tolist() == [7, -8, 7, 0, -7, 0]


def test_pack_puts_the_first_value_into_the_lowest_nibble() -> None:
    q_NK = torch.tensor([[-8, -7, -6, -5, 4, 5, 6, 7]], dtype=torch.int8)
    assert int4.pack(q_NK).tolist() == [[0xFEDC3210 - 2**32]]


@given(seed=st.integers(0, 2**32), shift=st.floats(-3, 3))
def test_w4a8_activations_are_on_the_kernels_grid(seed: int, shift: float) -> None:
    """An identity weight shows what the kernel makes of the activation."""
    k, generator = 32, torch.Generator().manual_seed(seed)
    x = torch.randn(5, k, generator=generator) + shift
    x[0] = 0.0
    identity = torch.eye(k, dtype=torch.int8)
    packed = int4.w4a8_pack(identity, torch.ones(k, 1), None)
    seen = torch.ops.aten._dyn_quant_matmul_4bit(x, packed, k, k, k)
    ours = int4.round_activation(x)
    step = (x.amax(1) - x.amin(1)) / 255
    # float32 products on the edge between two steps may fall either way; all others agree.
    assert ((seen - ours).abs() <= 1.001 * step[:, None]).all()
    assert ((seen - ours).abs() < 1e-5).float().mean() > 0.97


@pytest.mark.parametrize("shape", [(48, 64), (64, 48)])
def test_engine_layout_wants_multiples_of_32(shape: tuple[int, int]) -> None:
    from qarl.errors import KernelError

    with pytest.raises(KernelError, match="divisible by 32"):
        int4.engine_w4a16_layout(torch.zeros(shape, dtype=torch.int8))

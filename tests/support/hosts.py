"""What tests need of a processor, and what the engine computes on processors that lack it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qarl.numerics import processor
from qarl.quant.int8 import quantize_activation, w8a8_forward
from qarl.quant.scheme import KernelKind

EXACT_W8A8: KernelKind = "torch" if processor.has_vnni() else "engine"
"""The learner's W8A8 kernel that gives the engine's values; where torch's does, it is the stricter test."""
needs_avx512 = pytest.mark.skipif(
    not processor.has_avx512(), reason="vLLM has no such kernel on a processor without AVX-512"
)


def engine_sums(q_x_MK: Tensor, q_w_NK: Tensor) -> Tensor:
    """int64 [M, N], as oneDNN's int8 GEMM adds them here; K even.

    Without VNNI it makes activations unsigned, adds products in pairs that saturate at 16 bits, and corrects by the
    weight's sums:

        sum_k sat16( (x_2k + 128) w_2k + (x_2k+1 + 128) w_2k+1 ) - 128 sum_k w_k
    """
    x, w = q_x_MK.long(), q_w_NK.long()
    if processor.has_vnni():
        return x @ w.t()
    products_MNK = (x + 128)[:, None] * w
    pairs = products_MNK.unflatten(-1, (-1, 2)).sum(-1)
    return pairs.clamp(-(2**15), 2**15 - 1).sum(-1) - 128 * w.sum(1)


def engine_w8a8(x_MK: Tensor, q_NK: Tensor, scale_N1: Tensor, bias_N: Tensor | None) -> Tensor:
    """vLLM's W8A8 layer by its definition on this processor: [M, N] in the dtype of x."""
    if processor.has_vnni():
        return w8a8_forward(x_MK, q_NK, scale_N1, bias_N)
    q_x_MK, scale_M1 = quantize_activation(x_MK)
    y_MN = engine_sums(q_x_MK, q_NK).float() * scale_N1.view(1, -1)
    if bias_N is None:
        y_MN = y_MN * scale_M1
    elif processor.has_avx512():
        y_MN = torch.addcmul(bias_N.double(), y_MN.double(), scale_M1.double()).float()
    else:
        y_MN = y_MN * scale_M1 + bias_N.float()
    return processor.round_as_engine(y_MN, x_MK.dtype)

"""The W4A16 GEMM on CUDA, in Triton: reads the checkpoint's packed weight as it is. Imports triton: import it late.

Suffixes: M tokens, K input features, N output features, G groups of K, W packed words of K.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qarl.quant.int4 import NIBBLES

# One tile for every M, and K in one order: a token has the same bits in any batch. 76 KiB of shared memory.
BLOCK_M, BLOCK_N, BLOCK_K = 128, 128, 64
WARPS, STAGES = 8, 3


@triton.jit(do_not_specialize=["tokens"])
def _gemm(  # type: ignore[no-untyped-def]
    x_ptr, packed_ptr, scale_ptr, bias_ptr, y_ptr, tokens, outputs,
    K: tl.constexpr, GROUP: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of y: float32 sum over blocks of K, each within one group."""
    m = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    n = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    word = tl.arange(0, BLOCK_K // 8)
    shift = tl.arange(0, 8) * 4
    real_m, real_n = (m < tokens)[:, None], (n < outputs)[:, None]
    sum_MN = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        x_MK = tl.load(x_ptr + m[:, None] * K + (start + k)[None, :], mask=real_m, other=0.0)
        words = packed_ptr + n[:, None] * (K // 8) + (start // 8 + word)[None, :]
        words_NW = tl.load(words, mask=real_n, other=0)
        scale_N1 = tl.load(scale_ptr + n[:, None] * (K // GROUP) + start // GROUP, mask=real_n, other=0.0)
        q_NK = tl.reshape((words_NW[:, :, None] >> shift[None, None, :]) & 15, (BLOCK_N, BLOCK_K)) - 8
        w_NK = (q_NK.to(tl.float32) * scale_N1.to(tl.float32)).to(tl.bfloat16)
        sum_MN = tl.dot(x_MK, tl.trans(w_NK), sum_MN)
    if HAS_BIAS:
        sum_MN += tl.load(bias_ptr + n, mask=n < outputs, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + m[:, None] * outputs + n[None, :], sum_MN.to(tl.bfloat16), mask=real_m & (n < outputs)[None, :])


def w4a16_linear(x_MK: Tensor, packed_NW: Tensor, scale_NG: Tensor, bias_N: Tensor | None) -> Tensor:
    """y = x w^T + b with w = bfloat16(q * s), summed in float32 and rounded once: bfloat16 [M, N].

    Args:
        x_MK: bfloat16, any M.
        packed_NW: int32 [N, K/8], compressed-tensors' packing (`qarl.quant.int4.pack`).
        scale_NG: bfloat16 [N, K/g].
    """
    m, k = x_MK.shape
    n, groups = scale_NG.shape
    assert x_MK.dtype == scale_NG.dtype == torch.bfloat16
    assert packed_NW.shape == (n, k // NIBBLES)
    y_MN = x_MK.new_empty(m, n)
    if m == 0:
        return y_MN
    group = k // groups
    _gemm[triton.cdiv(m, BLOCK_M), triton.cdiv(n, BLOCK_N)](
        x_MK.contiguous(), packed_NW, scale_NG, y_MN if bias_N is None else bias_N, y_MN, m, n,
        k, group, bias_N is not None, BLOCK_M, BLOCK_N, min(BLOCK_K, group), num_warps=WARPS, num_stages=STAGES,
    )  # fmt: skip
    return y_MN

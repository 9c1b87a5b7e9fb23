"""fp8 (e4m3fn): weight and activation grids, and the GEMM of fp8 values, scaled in float32.

Suffixes: M tokens, K input features, N output features; C, B blocks of N, of K.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from qarl.errors import KernelError
from qarl.numerics.scaled_mm import enough_rows, without_onednn
from qarl.quant.int8 import finite_amax

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0
BLOCK = 128  # side of a weight block, and activations that share a scale with it
CUDA_MULTIPLE = 16  # of K and N in torch's GEMM
SMALLEST_ACTIVATION_SCALE = 1.0 / (LARGEST * 512.0)  # the engine's


def quantize_channels(weight_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize a weight with one scale per output channel.

        s = amax / 448        q = e4m3(clamp(w / s, -448, 448)), to nearest, ties to even

    Returns e4m3 `q_NK` and float32 `scale_N1`. A scale of 0 becomes float32 eps.
    Raises KernelError: NaN or infinity in the weight.
    Source: compressed-tensors 0.17 `calculate_qparams`, `quantize`; tested bit-equal.
    """
    weight = weight_NK.detach().float()
    scale_N1 = _scale(finite_amax(weight))
    return _round(weight, scale_N1), scale_N1


def quantize_tensor(weight_NK: Tensor, amax: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """As `quantize_channels` with one scale in all: e4m3 `q_NK` and a float32 scale [1].

    `amax` is the largest magnitude of all weights that share the scale; without it that of this weight.
    """
    weight = weight_NK.detach().float()
    own = finite_amax(weight).max()
    scale = _scale(own if amax is None else amax.float()).reshape(1)
    return _round(weight, scale), scale


def quantize_blocks(weight_NK: Tensor) -> tuple[Tensor, Tensor]:
    """As `quantize_channels` with one scale per 128 x 128 block; N and K are filled up with zeros.

    Returns e4m3 `q_NK` and float32 `scale_CB`. Source: DeepSeek-V3 (arXiv 2412.19437), section 3.3.
    """
    n, k = weight_NK.shape
    weight = weight_NK.detach().float()
    finite_amax(weight)
    padded = F.pad(weight, (0, -k % BLOCK, 0, -n % BLOCK))
    blocks = padded.view(-1, BLOCK, padded.shape[1] // BLOCK, BLOCK)
    scale = _scale(blocks.abs().amax((1, 3), keepdim=True))
    return _round(blocks, scale).view(padded.shape)[:n, :k].contiguous(), scale[:, 0, :, 0]


def _scale(amax: Tensor) -> Tensor:
    scale = amax / LARGEST
    return torch.where(scale == 0, torch.finfo(torch.float32).eps, scale)


def _round(weight: Tensor, scale: Tensor) -> Tensor:
    # + 0.0: the library adds a zero point, which turns -0.0 into 0.0
    return (weight / scale + 0.0).clamp(-LARGEST, LARGEST).to(E4M3)


def dequantize(q: Tensor, scale: Tensor, rows: int = 1, columns: int = 1) -> Tensor:
    """q * s in float32; one scale spans `rows` x `columns` of q, and broadcasts where it has size 1."""
    n, k = q.shape
    spread = scale.repeat_interleave(rows, 0)[:n] if rows > 1 else scale
    return q.float() * (spread.repeat_interleave(columns, 1)[:, :k] if columns > 1 else spread)


def quantize_activation(x_MK: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize activations per token as vLLM does.

        s_m = max( max_k |x_mk| / 448, 1 / (448 * 512) )        q = e4m3(clamp(x * (1 / s)))

    Returns e4m3 `q_MK` and float32 `scale_M1`.
    """
    x = x_MK.float()
    scale_M1 = (x.abs().amax(1, keepdim=True) / LARGEST).clamp(min=SMALLEST_ACTIVATION_SCALE)
    return (x * scale_M1.reciprocal()).clamp(-LARGEST, LARGEST).to(E4M3), scale_M1


def quantize_activation_groups(x_MK: Tensor) -> tuple[Tensor, Tensor]:
    """As `quantize_activation`, per token and 128 input features; vLLM divides here. `q_MK` and `scale_MB`."""
    groups = x_MK.float().view(x_MK.shape[0], -1, BLOCK)
    scale = (groups.abs().amax(2, keepdim=True) / LARGEST).clamp(min=SMALLEST_ACTIVATION_SCALE)
    return (groups / scale).clamp(-LARGEST, LARGEST).to(E4M3).flatten(1), scale.squeeze(2)


def w8a8_forward(x_MK: Tensor, q_NK: Tensor, scale: Tensor, bias_N: Tensor | None) -> Tensor:
    """The engine's CPU arithmetic, bit for bit: [M, N] in the dtype of `x_MK`; `scale` is [N, 1] or [1].

    y = (q_x q_w^T) * s_x * s_w + b        all in float32, rounded once
    """
    q_x_MK, scale_M1 = quantize_activation(x_MK)
    one = torch.ones(1)
    with without_onednn():
        y_MN = torch._scaled_mm(enough_rows(q_x_MK), q_NK.t(), scale_a=one, scale_b=one, out_dtype=torch.float32)
    y_MN = y_MN[: len(x_MK)] * scale_M1 * scale.view(1, -1)
    return (y_MN if bias_N is None else y_MN + bias_N).to(x_MK.dtype)


def row_wise_forward_cuda(x_MK: Tensor, q_NK: Tensor, scale: Tensor, bias_N: Tensor | None) -> Tensor:
    """torch's scaled GEMM with a scale per token and per channel: bfloat16 [M, N]. `scale` is [N, 1] or [1]."""
    q_x_MK, scale_M1 = quantize_activation(x_MK)
    scale_1N = scale.view(1, -1).expand(1, q_NK.shape[0]).contiguous()
    return torch._scaled_mm(q_x_MK, q_NK.t(), scale_M1, scale_1N, bias=bias_N, out_dtype=torch.bfloat16)


def block_forward_cuda(x_MK: Tensor, q_NK: Tensor, scale_CB: Tensor, bias_N: Tensor | None) -> Tensor:
    """torch's scaled GEMM of 1 x 128 groups of activations and 128 x 128 blocks of weights: bfloat16 [M, N]."""
    m = x_MK.shape[0]
    padded = F.pad(x_MK, (0, 0, 0, -m % 4))  # cuBLASLt takes multiples of 4 tokens
    q_x_MK, scale_MB = quantize_activation_groups(padded)
    by_column = scale_MB.t().contiguous().t()
    y_MN = torch._scaled_mm(q_x_MK, q_NK.t(), by_column, scale_CB.t(), out_dtype=torch.bfloat16)[:m]
    return y_MN if bias_N is None else y_MN + bias_N


def check_cuda_shape(q_NK: Tensor) -> None:
    """Raises KernelError for a shape that torch's fp8 GEMM on CUDA does not take."""
    n, k = q_NK.shape
    if n % CUDA_MULTIPLE or k % CUDA_MULTIPLE:
        what = f"torch's fp8 GEMM on cuda needs K and N divisible by {CUDA_MULTIPLE}, got K={k} N={n}"
        raise KernelError(what, hint="add the layer to rollout.ignore")

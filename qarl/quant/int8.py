"""W8A8 int8: grids and the real int8 GEMM in torch.

Suffixes: M tokens, K input features, N output features.
"""

import torch
from torch import Tensor

from qarl.errors import KernelError
from qarl.numerics import processor

EXACT_K = 1024
"""Products of int8 that float32 adds exactly, in any order: 1024 x 128 x 128 = 2^24."""
WEIGHT_HALF_RANGE = 127.5  # (127 - -128) / 2: compressed-tensors' symmetric int8 grid
CUDA_MULTIPLE = 8  # of K and N in torch's GEMM
ACTIVATION_MAX = 127.0  # the engine's dynamic activation grid is -127..127


def quantize_weight(weight_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize a weight per output channel on the compressed-tensors grid.

        s_n = max_k |w_nk| / 127.5        q = round(clamp(w / s, -128, 127))

    The weight has the model's dtype: the engine never sees a finer master. Returns int8 `q_NK`, contiguous, and float32
    `scale_N1`. A zero channel gets the scale float32 eps. Raises KernelError: NaN or infinity in the weight.
    Source: compressed-tensors 0.17 `calculate_qparams`, `quantize`; tested bit-equal.
    """
    weight = weight_NK.detach().float()
    scale_N1 = finite_amax(weight) / WEIGHT_HALF_RANGE
    scale_N1 = torch.where(scale_N1 == 0, torch.finfo(torch.float32).eps, scale_N1)
    return (weight / scale_N1).clamp_(-128, 127).round_().to(torch.int8), scale_N1


def finite_amax(weight: Tensor) -> Tensor:
    """Largest magnitude over the last dimension, which is kept. Raises KernelError for NaN and infinity."""
    amax = weight.abs().amax(dim=-1, keepdim=True)
    if not torch.isfinite(amax).all():
        rows = (~torch.isfinite(amax)).nonzero()[:, 0].unique()[:3].tolist()
        raise KernelError(f"NaN or infinity in weight rows {rows}", hint="lower the learning rate, check the loss")
    return amax


def quantize_activation(x_MK: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize activations per token as vLLM's CPU kernel does.

        s_m = max_k |x_mk| / 127          q = round(x * (1 / s))

    The engine multiplies by the reciprocal; dividing would flip 0.02% of the values. A zero token stays zero.
    Returns int8 `q_MK` and float32 `scale_M1`.
    """
    x = x_MK.float()
    scale_M1 = x.abs().amax(dim=1, keepdim=True) / ACTIVATION_MAX
    inverse = torch.where(scale_M1 == 0, 0.0, 1.0 / scale_M1)
    return (x * inverse).round().to(torch.int8), scale_M1


def int8_gemm(q_x_MK: Tensor, q_w_NK: Tensor) -> Tensor:
    """Exact integer product `q_x @ q_w.T` as int32 [M, N]; accumulation order cannot matter.

    Processors without VNNI multiply float32 copies: torch's int8 loop is 15 times slower there.
    Raises KernelError: the device has no int8 GEMM for these shapes.
    """
    m, k = q_x_MK.shape
    n = q_w_NK.shape[0]
    if q_x_MK.device.type == "cuda":
        if k % CUDA_MULTIPLE or n % CUDA_MULTIPLE:
            what = f"CUDA int8 GEMM needs K and N divisible by {CUDA_MULTIPLE}, got K={k} N={n}"
            raise KernelError(what, hint="add the layer to rollout.ignore")
        if m <= 16:  # cuBLASLt refuses fewer rows than 17; zero rows change nothing.
            padded = q_x_MK.new_zeros(17, k)
            padded[:m] = q_x_MK
            return torch._int_mm(padded, q_w_NK.t())[:m]
    elif not processor.has_vnni():
        out_MN = torch.zeros(m, n, dtype=torch.int32)
        for x, w in zip(q_x_MK.split(EXACT_K, 1), q_w_NK.split(EXACT_K, 1), strict=True):
            out_MN += (x.float() @ w.float().t()).to(torch.int32)
        return out_MN
    return torch._int_mm(q_x_MK, q_w_NK.t())


def w8a8_forward(x_MK: Tensor, q_NK: Tensor, scale_N1: Tensor, bias_N: Tensor | None) -> Tensor:
    """The engine's CPU arithmetic, bit for bit, in float32 with one rounding to x's dtype at the end.

        y = (int32 * s_w) * s_x          with a bias: fma(int32 * s_w, s_x, b)

    Returns [M, N] in the dtype of `x_MK`.
    """
    q_x_MK, scale_M1 = quantize_activation(x_MK)
    y_MN = int8_gemm(q_x_MK, q_NK).float().mul_(scale_N1.view(1, -1))
    if bias_N is None:
        y_MN.mul_(scale_M1)
    else:  # float64 holds the product exactly, so that product and sum round once, as the fused op does
        y_MN = torch.addcmul(bias_N.double(), y_MN.double(), scale_M1.double()).float()
    return y_MN.to(x_MK.dtype)

"""int4 weights in groups: grid, packing, and the two engine layouts.

Suffixes: M tokens, K input features, N output features, G groups of K.
"""

import torch
from torch import Tensor

from qarl.errors import KernelError
from qarl.quant.int8 import finite_amax

HALF_RANGE = 7.5  # (7 - -8) / 2: compressed-tensors' symmetric int4 grid; GPTQ-style quantizers divide by 7
CPU_MULTIPLE = 32  # of K and N in the engine's CPU kernel
NIBBLES = 8  # int4 values of one int32


def quantize_weight(weight_NK: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Quantize a weight per group of `group_size` input features on the compressed-tensors grid.

        s_ng = max |w_ng| / 7.5, rounded to the weight's dtype        q = round(clamp(w / s, -8, 7))

    The engine holds scales in the model's dtype; the quotient is taken in float32. Returns int8 `q_NK` of int4 values,
    and `scale_NG` in the weight's dtype. A zero group gets the dtype's eps. Raises KernelError: NaN or infinity.
    Source: compressed-tensors 0.17 `calculate_qparams`, `quantize`; tested bit-equal.
    """
    n = weight_NK.shape[0]
    groups = weight_NK.detach().float().view(n, -1, group_size)
    dtype = weight_NK.dtype
    scale_NG = (finite_amax(groups) / HALF_RANGE).to(dtype)
    scale_NG = torch.where(scale_NG == 0, torch.finfo(dtype).eps, scale_NG).to(dtype)
    q = (groups / scale_NG.float()).clamp(-8, 7).round().to(torch.int8)
    return q.view(n, -1), scale_NG.squeeze(-1)


def pack(q_NK: Tensor) -> Tensor:
    """int4 values [N, K] as int32 [N, K/8] in compressed-tensors' order: offset binary, low nibble first."""
    words = (q_NK.to(torch.int64) + 8).view(q_NK.shape[0], -1, NIBBLES)
    shifts = torch.arange(NIBBLES, device=q_NK.device) * 4
    return (words << shifts).sum(-1).to(torch.int32)  # the cast keeps the low 32 bits


def unpack(packed_NW: Tensor) -> Tensor:
    """The inverse of `pack`: int8 [N, K]."""
    shifts = torch.arange(NIBBLES, device=packed_NW.device, dtype=torch.int32) * 4
    nibbles = (packed_NW[..., None] >> shifts) & 15
    return (nibbles - 8).to(torch.int8).flatten(1)


def dequantize(q_NK: Tensor, scale_NG: Tensor) -> Tensor:
    """q * s, exact in float32: [N, K]."""
    groups = q_NK.float().view(*scale_NG.shape, -1)
    return (groups * scale_NG.float()[..., None]).flatten(1)


def round_activation(x_MK: Tensor) -> Tensor:
    """Activations as torch's dynamic 4-bit kernel rounds them: asymmetric int8 per token, float32 [M, K].

        s = 255 / (hi - lo)    z = round(zero point)    q = clamp(round(x s) + z, -128, 127)    x' = (q - z) / s

    with lo <= 0 <= hi, x s rounded half away from zero. The zero point is taken from the end of the range whose error
    is smaller.
    """
    x = x_MK.float()
    low, high = x.amin(1, keepdim=True).clamp(max=0), x.amax(1, keepdim=True).clamp(min=0)
    scale = torch.where(low == high, 1.0, 255.0 / (high - low))
    at_low, at_high = low * scale, high * scale
    zero = torch.where(at_low + at_high > 1, -128.0 - at_low, 127.0 - at_high).clamp(-128, 127).round()
    steps = (x * scale).abs().add(0.5).floor().copysign(x)
    return ((steps + zero).clamp(-128, 127) - zero) * (1.0 / scale)


def engine_w4a16_layout(q_NK: Tensor) -> Tensor:
    """The weight as vLLM's CPU kernel reads it: blocks of 16 output channels, nibbles along the outputs."""
    n, k = q_NK.shape
    if n % CPU_MULTIPLE or k % CPU_MULTIPLE:
        what = f"the CPU W4A16 kernel needs N and K divisible by {CPU_MULTIPLE}, got N={n} K={k}"
        raise KernelError(what, hint="add the layer to rollout.ignore")
    return pack(q_NK.t().contiguous()).view(k, -1, 16 // NIBBLES).permute(1, 0, 2).reshape(-1, k * 2).contiguous()


def w4a8_pack(q_NK: Tensor, scale_NG: Tensor, bias_N: Tensor | None) -> Tensor:
    """Weight, scales and bias as torch's dynamic 4-bit kernel reads them: one flat tensor.

    Group-wise scales are bfloat16 there, a per-channel scale (one group) float32.
    """
    n, k = q_NK.shape
    low, high = (q_NK[:, i::2].to(torch.uint8) + 8 & 15 for i in (0, 1))
    groups = scale_NG.shape[1]
    scale = scale_NG.float().view(-1, 1) if groups == 1 else scale_NG.to(torch.bfloat16)
    bias = None if bias_N is None else bias_N.float()
    return torch.ops.aten._dyn_quant_pack_4bit_weight(high << 4 | low, scale, bias, k // groups, k, n)

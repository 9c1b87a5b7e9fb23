"""fp4 (e2m1) in groups: the MX grid (32 values, power-of-two scales) and the NV grid (16 values, two levels of scales).

Sources: OCP Microscaling Formats 1.0; compressed-tensors 0.17, against which weights are tested bit-equal.
Suffixes: M tokens, K input features, N output features, G groups of K.
"""

from functools import cache

import torch
from torch import Tensor

from qarl.errors import KernelError
from qarl.quant.fp8 import E4M3
from qarl.quant.fp8 import LARGEST as LARGEST_SCALE
from qarl.quant.int8 import finite_amax

MX_GROUP, NV_GROUP = 32, 16
LARGEST = 6.0
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
EMPTY_NV_SCALE = 0.125  # the library's, for a group whose scale rounds to 0
INPUT_GLOBAL_SCALE = 1.0
"""Global scale of nvfp4 activations. The format needs it static, from calibration: 448 * 6 / (largest activation). A
policy in training has no calibration set that stays true, so qarl takes the library's value for the uncalibrated, for
every layer: groups of magnitude 0.1 to 2,688 keep the full precision of their scale, smaller ones lose some, larger
ones are clipped."""


def quantize_mx(weight_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize a weight to mxfp4: groups of 32 input features share a power of two.

        e = floor(log2(amax)) - 2 (one more when amax >= 1.75 * 2^floor)        q = e2m1(w / 2^e)

    Returns packed codes uint8 [N, K/2] and biased exponents e + 127 as uint8 [N, G], at least 0.
    Raises KernelError: NaN, infinity, or a magnitude of 1.75 * 2^127, which rounds to infinity.
    """
    groups = weight_NK.detach().float().unflatten(1, (-1, MX_GROUP))
    amax_NG1 = finite_amax(groups)
    if (amax_NG1 >= 1.75 * 2.0**127).any():
        raise KernelError("a weight rounds to infinity in mxfp4", hint="lower the learning rate, check the loss")
    exponent_NG1 = _mx_exponent(amax_NG1)
    return pack(encode(groups / _power(exponent_NG1))), exponent_NG1.squeeze(2)


def _mx_exponent(amax: Tensor) -> Tensor:
    # Adding a quarter of the mantissa's range carries into the exponent from 1.75 on.
    return ((amax.view(torch.int32) + (1 << 21) >> 23) - 2).clamp(min=0).to(torch.uint8)


def _power(exponent: Tensor) -> Tensor:
    return exponent.view(torch.float8_e8m0fnu).float()


def dequantize_mx(packed_NP: Tensor, exponent_NG: Tensor) -> Tensor:
    """q * 2^e, exact in float32: [N, K]."""
    return (decode(packed_NP).unflatten(1, (-1, MX_GROUP)) * _power(exponent_NG)[..., None]).flatten(1)


def round_mx(x_MK: Tensor) -> Tensor:
    """Activations on the mxfp4 grid, as the library rounds them: float32 [M, K]."""
    groups = x_MK.float().unflatten(1, (-1, MX_GROUP))
    power = _power(_mx_exponent(groups.abs().amax(2, keepdim=True)))
    return (_values(encode(groups / power)) * power).flatten(1)


def quantize_nv(weight_NK: Tensor, amax: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize a weight to nvfp4: groups of 16 input features share an e4m3 scale, all groups a float32 scale.

        g = 448 * 6 / amax        s = e4m3(g * amax_group / 6)        q = e2m1(w / (s / g))

    Args:
        amax: largest magnitude over all weights that share `g`; without it that of this weight.
    Returns:
        packed codes uint8 [N, K/2], e4m3 scales [N, G] (0.125 where they round to 0), and `g` float32 [1], which is 1
        where 448 * 6 / amax overflows.
    Raises:
        KernelError: NaN or infinity in the weight.
    """
    groups = weight_NK.detach().float().unflatten(1, (-1, NV_GROUP))
    amax_NG1 = finite_amax(groups)
    global_scale = _nv_global_scale(amax_NG1.max() if amax is None else amax.float())
    scale_NG1 = (global_scale * (amax_NG1 / LARGEST)).clamp(max=LARGEST_SCALE).to(E4M3)
    scale_NG1 = torch.where(scale_NG1.float() == 0, EMPTY_NV_SCALE, scale_NG1.float()).to(E4M3)
    codes = encode(groups / (scale_NG1.float() / global_scale))
    return pack(codes), scale_NG1.squeeze(2), global_scale


def _nv_global_scale(amax: Tensor) -> Tensor:
    scale = LARGEST_SCALE * LARGEST / amax.clamp(min=torch.finfo(torch.float32).tiny)
    return torch.where(scale.isinf(), 1.0, scale).reshape(1)


def dequantize_nv(packed_NP: Tensor, scale_NG: Tensor, global_scale: Tensor) -> Tensor:
    """q * (s / g) in float32: [N, K]."""
    groups = decode(packed_NP).unflatten(1, (-1, NV_GROUP))
    return (groups * (scale_NG.float() / global_scale)[..., None]).flatten(1)


def round_nv(x_MK: Tensor, global_scale: float = INPUT_GLOBAL_SCALE) -> Tensor:
    """Activations on the nvfp4 grid, as vLLM rounds them (`ref_nvfp4_quant_dequant`): float32 [M, K].

        s = e4m3(clamp(g * (amax_group * (1/6))))        q = e2m1(x * (1 / (s * (1/g))))        x' = q * (s / g)

    A group whose scale rounds to 0 becomes 0.
    """
    groups = x_MK.float().unflatten(1, (-1, NV_GROUP))
    amax = groups.abs().amax(2, keepdim=True)
    scale = (global_scale * (amax * (1 / LARGEST))).clamp(max=LARGEST_SCALE).to(E4M3).float()
    inverse = torch.where(scale == 0, 0.0, 1.0 / (scale * (1 / global_scale)))
    return (_values(encode(groups * inverse)) * (scale / global_scale)).flatten(1)


def encode(x: Tensor) -> Tensor:
    """Nearest e2m1 code of each float32 value, uint8: sign bit 8, then the index in `VALUES`; beyond 6 it is 6.

    Ties go to the even code. A negative value that rounds to 0 keeps its sign, as in the library; -0.0 does not.
    """
    return torch.bucketize(x.abs(), _boundaries(x.device), right=True).to(torch.uint8) | (x < 0).to(torch.uint8) << 3


@cache
def _boundaries(device: torch.device) -> Tensor:
    """A value at or above boundary i has a code above i."""
    middle = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    middle[::2] = middle[::2].nextafter(torch.tensor(torch.inf))  # these ties go down
    return middle.to(device)


def _values(codes: Tensor) -> Tensor:
    magnitude = torch.tensor(VALUES, device=codes.device)[(codes & 7).int()]
    return torch.where(codes > 7, -magnitude, magnitude)


def pack(codes: Tensor) -> Tensor:
    """Codes [N, G, group] as bytes [N, K/2], the first of two in the low nibble."""
    flat = codes.flatten(1)
    return flat[:, ::2] | flat[:, 1::2] << 4


def decode(packed_NP: Tensor) -> Tensor:
    """The values of packed codes: float32 [N, K]."""
    return _values(torch.stack((packed_NP & 15, packed_NP >> 4), -1).flatten(1))

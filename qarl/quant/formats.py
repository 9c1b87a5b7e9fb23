"""What each scheme's bytes are: the one table of formats. Everything that differs between formats is a field here.

Suffixes: M tokens, K input features, N output features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qarl.errors import ConfigError
from qarl.quant import int4, int8
from qarl.quant.scheme import GROUPED, QuantScheme

Quantized = dict[str, Tensor]
"""A quantized weight by the last parts of its names in a compressed-tensors checkpoint: `weight_scale`, ..."""


@dataclass(frozen=True)
class Format:
    """How one linear layer is quantized. All functions are pure.

    `quantize` makes the checkpoint's tensors of a weight [N, K]; `dequantize` gives their float32 value [N, K];
    `round_activation` gives float32 [M, K] on the activation grid (the activation itself in weight-only formats).
    `compression`, `weights` and `input_activations` are compressed-tensors' words for it. `engine_kernels` are the
    class names of vLLM's kernels that implement it; any other choice of the engine is an error.
    """

    quantize: Callable[[Tensor], Quantized]
    dequantize: Callable[[Quantized], Tensor]
    round_activation: Callable[[Tensor], Tensor]
    weight_bits: int
    activation_bits: int
    compression: str
    weights: dict[str, Any]
    input_activations: dict[str, Any] | None
    engine_kernels: tuple[str, ...]
    k_multiple: int = 1
    """K must be divisible by it."""

    def reference(self, x_MK: Tensor, quantized: Quantized, bias_N: Tensor | None) -> Tensor:
        """The layer in float32 arithmetic, rounded once to x's dtype: what every kernel is compared with. [M, N]."""
        bias = None if bias_N is None else bias_N.float()
        y_MN = torch.nn.functional.linear(self.round_activation(x_MK), self.dequantize(quantized), bias)
        return y_MN.to(x_MK.dtype)


def format_of(scheme: QuantScheme) -> Format:
    """The format of a quantizing scheme. Raises ConfigError for a group size that the format does not have."""
    if scheme.name in GROUPED and scheme.group_size not in GROUP_SIZES:
        raise ConfigError(
            f"group size {scheme.group_size} is none of {', '.join(map(str, GROUP_SIZES))}", where="rollout.group_size"
        )
    return _FORMATS[scheme.name](scheme)


def quantization_config(scheme: QuantScheme) -> dict[str, Any] | None:
    """The `quantization_config` of a compressed-tensors checkpoint; None for an unquantized one.

    Source: compressed-tensors 0.17 `QuantizationConfig`.
    """
    if not scheme.quantizes:
        return None
    form = format_of(scheme)
    group = {"weights": form.weights, "input_activations": form.input_activations, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": form.compression,
        "quantization_status": "compressed",
        "ignore": scheme.library_ignore(),
        "config_groups": {"group_0": {"targets": ["Linear"], **group}},
    }


def engine_kernels(scheme: QuantScheme) -> tuple[str, ...]:
    """Class names of the vLLM kernels that implement `scheme`; none for an unquantized one."""
    return format_of(scheme).engine_kernels if scheme.quantizes else ()


GROUP_SIZES = (32, 64, 128)
_DYNAMIC_INT8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}


def _integer(bits: int, **args: Any) -> dict[str, Any]:
    return {"num_bits": bits, "type": "int", "symmetric": True, "dynamic": False, "observer": "minmax", **args}


def _w8a8_int8(_: QuantScheme) -> Format:
    return Format(
        quantize=lambda weight: dict(zip(("weight", "weight_scale"), int8.quantize_weight(weight), strict=True)),
        dequantize=lambda q: q["weight"].float() * q["weight_scale"],
        round_activation=_int8_activation,
        weight_bits=8,
        activation_bits=8,
        compression="int-quantized",
        weights=_integer(8, strategy="channel"),
        input_activations=_DYNAMIC_INT8,
        engine_kernels=(
            "CPUInt8ScaledMMLinearKernel",
            "CutlassInt8ScaledMMLinearKernel",
            "TritonInt8ScaledMMLinearKernel",
        ),
    )


def _w4a16(scheme: QuantScheme) -> Format:
    return Format(
        quantize=partial(_quantize_packed_int4, group_size=scheme.group_size),
        dequantize=lambda q: int4.dequantize(int4.unpack(q["weight_packed"]), q["weight_scale"]),
        round_activation=lambda x: x.float(),
        weight_bits=4,
        activation_bits=16,
        compression="pack-quantized",
        weights=_integer(4, strategy="group", group_size=scheme.group_size),
        input_activations=None,
        engine_kernels=("CPUWNA16LinearKernel", "MarlinLinearKernel", "MacheteLinearKernel"),
        k_multiple=scheme.group_size,
    )


def _w4a8(scheme: QuantScheme) -> Format:
    return Format(
        quantize=partial(_quantize_int4, group_size=scheme.group_size),
        dequantize=lambda q: int4.dequantize(q["weight"], q["weight_scale"]),
        round_activation=int4.round_activation,
        weight_bits=4,
        activation_bits=8,
        compression="int-quantized",
        weights=_integer(4, strategy="group", group_size=scheme.group_size),
        input_activations={**_DYNAMIC_INT8, "symmetric": False},
        engine_kernels=("Dynamic4bitLinearKernel",),
        k_multiple=scheme.group_size,
    )


_FORMATS: dict[str, Callable[[QuantScheme], Format]] = {"w8a8_int8": _w8a8_int8, "w4a16": _w4a16, "w4a8": _w4a8}


def _quantize_packed_int4(weight_NK: Tensor, group_size: int) -> Quantized:
    q_NK, scale_NG = int4.quantize_weight(weight_NK, group_size)
    shape = torch.tensor(weight_NK.shape, dtype=torch.int64)
    return {"weight_packed": int4.pack(q_NK), "weight_scale": scale_NG, "weight_shape": shape}


def _quantize_int4(weight_NK: Tensor, group_size: int) -> Quantized:
    q_NK, scale_NG = int4.quantize_weight(weight_NK, group_size)
    return {"weight": q_NK, "weight_scale": scale_NG}


def _int8_activation(x_MK: Tensor) -> Tensor:
    q_MK, scale_M1 = int8.quantize_activation(x_MK)
    return q_MK.float() * scale_M1

"""What each scheme's bytes are: the one table of formats. Everything that differs between formats is a field here.

Suffixes: M tokens, K input features, N output features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qarl.errors import ConfigError
from qarl.numerics import processor
from qarl.quant import fp4, fp8, int4, int8
from qarl.quant.scheme import GROUPED, QuantScheme

Quantized = dict[str, Tensor]
"""A quantized weight by the last parts of its names in a compressed-tensors checkpoint: `weight_scale`, ..."""


@dataclass(frozen=True)
class Format:
    """How one linear layer is quantized. All functions are pure.

    `quantize` makes the checkpoint's tensors of a weight [N, K], all on its device; `dequantize` gives their float32
    value [N, K]; `round_activation` gives float32 [M, K] on the activation grid (the activation itself in weight-only
    formats). `compression`, `weights` and `input_activations` are compressed-tensors' words for it. `engine_kernels`
    are, by device, the class names of vLLM's kernels that implement it, `engine_experts` those of its kernels for
    experts; any other choice of the engine is an error.
    """

    quantize: Callable[..., Quantized]
    dequantize: Callable[[Quantized], Tensor]
    round_activation: Callable[[Tensor], Tensor]
    weight_bits: int
    activation_bits: int
    compression: str
    weights: dict[str, Any]
    input_activations: dict[str, Any] | None
    engine_kernels: dict[str, tuple[str, ...]]
    engine_experts: dict[str, tuple[str, ...]] = field(default_factory=dict)
    k_multiple: int = 1
    """K must be divisible by it."""
    n_multiple: int = 1
    """N of a layer that the engine fuses with a following one must be divisible by it."""
    joint: bool = False
    """A scale spans the whole weight. The engine has one for all layers that it fuses (and would take the largest), so
    they share it: `quantize(weight, amax)`, with the largest magnitude of them all."""

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
    format_ = format_of(scheme)
    group = {"weights": format_.weights, "input_activations": format_.input_activations, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": format_.compression,
        "quantization_status": "compressed",
        "ignore": scheme.library_ignore(),
        "config_groups": {"group_0": {"targets": ["Linear"], **group}},
    }


def engine_kernels(scheme: QuantScheme, device: str) -> tuple[str, ...]:
    """Class names of the vLLM kernels that implement `scheme` on `device`; none for an unquantized one.

    Raises ConfigError: vLLM has none there.
    """
    if not scheme.quantizes:
        return ()
    if not (kernels := format_of(scheme).engine_kernels.get(device, ())):
        others = [name for name, make in _FORMATS.items() if device in make(QuantScheme()).engine_kernels]
        raise ConfigError(
            f"vLLM has no {scheme.name} kernel on {device}",
            where="rollout.scheme",
            mend=f"take {', '.join(others)} or none there, or run on another device",
        )
    return (*kernels, *format_of(scheme).engine_experts.get(device, ()))


def check_processor(scheme: QuantScheme, device: str) -> None:
    """Raises ConfigError: vLLM has `scheme` on CPU, but not for this machine's processor."""
    if device != "cpu" or not scheme.quantizes or processor.has_avx512():
        return
    by_name = {name: make(QuantScheme()).engine_kernels.get(device, ()) for name, make in _FORMATS.items()}
    here = [name for name, kernels in by_name.items() if {*kernels} - AVX512_KERNELS]
    if scheme.name not in here:
        raise ConfigError(
            f"vLLM has no {scheme.name} kernel on a processor without AVX-512",
            where="rollout.scheme",
            mend=f"take {', '.join(here)} or none there, or run on another machine",
        )


GROUP_SIZES = (32, 64, 128)
AVX512_KERNELS = {"CPUWNA16LinearKernel", "CPUExpertsInt8"}
"""vLLM's CPU kernels that its build for processors without AVX-512 lacks."""
_TORCH_FP8 = "ChannelWiseTorchFP8ScaledMMLinearKernel"
_DYNAMIC_INT8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}


def _named(names: str, quantize: Callable[..., tuple[Tensor, ...]]) -> Callable[..., Quantized]:
    return lambda *args: dict(zip(names.split(), quantize(*args), strict=True))


def _integer(bits: int, **args: Any) -> dict[str, Any]:
    return {"num_bits": bits, "type": "int", "symmetric": True, "dynamic": False, "observer": "minmax", **args}


def _w8a8_int8(_: QuantScheme) -> Format:
    return Format(
        quantize=_named("weight weight_scale", int8.quantize_weight),
        dequantize=lambda q: q["weight"].float() * q["weight_scale"],
        round_activation=_int8_activation,
        weight_bits=8,
        activation_bits=8,
        compression="int-quantized",
        weights=_integer(8, strategy="channel"),
        input_activations=_DYNAMIC_INT8,
        engine_kernels={
            "cpu": ("CPUInt8ScaledMMLinearKernel",),
            "cuda": ("CutlassInt8ScaledMMLinearKernel", "TritonInt8ScaledMMLinearKernel"),
        },
        engine_experts={"cpu": ("CPUExpertsInt8",), "cuda": ("TritonExperts",)},
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
        engine_kernels={"cpu": ("CPUWNA16LinearKernel",), "cuda": ("MarlinLinearKernel", "MacheteLinearKernel")},
        engine_experts={"cuda": ("MarlinExperts",)},
        k_multiple=scheme.group_size,
    )


def _w4a8(scheme: QuantScheme) -> Format:
    return Format(
        quantize=_named("weight weight_scale", partial(int4.quantize_weight, group_size=scheme.group_size)),
        dequantize=lambda q: int4.dequantize(q["weight"], q["weight_scale"]),
        round_activation=int4.round_activation,
        weight_bits=4,
        activation_bits=8,
        compression="int-quantized",
        weights=_integer(4, strategy="group", group_size=scheme.group_size),
        input_activations={**_DYNAMIC_INT8, "symmetric": False},
        engine_kernels={"cpu": ("Dynamic4bitLinearKernel",)},
        k_multiple=scheme.group_size,
    )


def _float(bits: int, **args: Any) -> dict[str, Any]:
    return {"num_bits": bits, "type": "float", "symmetric": True, "dynamic": False, **args}


def _fp4(strategy: str, group_size: int, scale_dtype: str) -> dict[str, Any]:
    return _float(4, strategy=strategy, group_size=group_size, scale_dtype=scale_dtype, zp_dtype=scale_dtype)


def _fp8_channel(_: QuantScheme) -> Format:
    return Format(
        quantize=_named("weight weight_scale", fp8.quantize_channels),
        dequantize=lambda q: fp8.dequantize(q["weight"], q["weight_scale"]),
        round_activation=lambda x: fp8.dequantize(*fp8.quantize_activation(x)),
        weight_bits=8,
        activation_bits=8,
        compression="float-quantized",
        weights=_float(8, strategy="channel"),
        input_activations=_float(8, strategy="token", dynamic=True),
        engine_kernels={"cpu": (_TORCH_FP8,), "cuda": ("CutlassFP8ScaledMMLinearKernel", _TORCH_FP8)},
    )


def _fp8_tensor(scheme: QuantScheme) -> Format:
    """On CPU vLLM lacks the op (`static_scaled_fp8_quant`) with which it unites the scales of fused layers."""
    format_ = _fp8_channel(scheme)
    return replace(
        format_,
        quantize=_named("weight weight_scale", fp8.quantize_tensor),
        weights=_float(8, strategy="tensor"),
        engine_kernels={"cuda": format_.engine_kernels["cuda"]},
        joint=True,
    )


def _fp8_block(scheme: QuantScheme) -> Format:
    """On CPU vLLM's kernel wants AMX, which is off (`vllm_patch`), and would leave the activations alone."""
    return replace(
        _fp8_channel(scheme),
        quantize=_named("weight weight_scale", fp8.quantize_blocks),
        dequantize=lambda q: fp8.dequantize(q["weight"], q["weight_scale"], fp8.BLOCK, fp8.BLOCK),
        round_activation=lambda x: fp8.dequantize(*fp8.quantize_activation_groups(x), columns=fp8.BLOCK),
        weights=_float(8, strategy="block", block_structure=[fp8.BLOCK, fp8.BLOCK]),
        input_activations=_float(8, strategy="group", dynamic=True, group_size=fp8.BLOCK),
        engine_kernels={
            "cuda": (
                "FlashInferFp8DeepGEMMDynamicBlockScaledKernel",
                "DeepGemmFp8BlockScaledMMKernel",
                "CutlassFp8BlockScaledMMKernel",
                "TritonFp8BlockScaledMMKernel",
                "BlockWiseTorchFP8ScaledMMLinearKernel",
            )
        },
        k_multiple=fp8.BLOCK,
        n_multiple=fp8.BLOCK,
    )


def _mxfp4a16(_: QuantScheme) -> Format:
    return Format(
        quantize=_named("weight_packed weight_scale", fp4.quantize_mx),
        dequantize=lambda q: fp4.dequantize_mx(q["weight_packed"], q["weight_scale"]),
        round_activation=lambda x: x.float(),
        weight_bits=4,
        activation_bits=16,
        compression="mxfp4-pack-quantized",
        weights=_fp4("group", fp4.MX_GROUP, "torch.uint8"),
        input_activations=None,
        engine_kernels={"cuda": ("MarlinMxFp4LinearKernel",)},
        k_multiple=fp4.MX_GROUP,
    )


def _mxfp4(scheme: QuantScheme) -> Format:
    format_ = _mxfp4a16(scheme)
    return replace(
        format_,
        round_activation=fp4.round_mx,
        activation_bits=4,
        input_activations={**format_.weights, "dynamic": True},
        engine_kernels={"cuda": ("FlashInferMxFp4LinearKernel", "B12xMxFp4LinearKernel", "EmulationMxfp4LinearKernel")},
    )


def _nvfp4a16(_: QuantScheme) -> Format:
    return Format(
        quantize=_named("weight_packed weight_scale weight_global_scale", fp4.quantize_nv),
        dequantize=lambda q: fp4.dequantize_nv(q["weight_packed"], q["weight_scale"], q["weight_global_scale"]),
        round_activation=lambda x: x.float(),
        weight_bits=4,
        activation_bits=16,
        compression="nvfp4-pack-quantized",
        weights=_fp4("tensor_group", fp4.NV_GROUP, "torch.float8_e4m3fn"),
        input_activations=None,
        engine_kernels={
            "cuda": (
                "MarlinNvFp4LinearKernel",
                "FlashInferCuteDslNvFp4W4A16LinearKernel",
                "B12xNvFp4W4A16LinearKernel",
            )
        },
        k_multiple=fp4.NV_GROUP,
        joint=True,
    )


def _nvfp4(scheme: QuantScheme) -> Format:
    """The activations' global scale is `fp4.INPUT_GLOBAL_SCALE` in every layer: there is no calibration."""
    format_ = _nvfp4a16(scheme)
    backends = ["FlashInferCuteDsl", "FlashInferCutlass", "FlashInferB12x", "FlashInferTrtllm", "FlashInferCudnn"]
    backends += ["Cutlass", "Fbgemm", "B12x", "Torch", "Emulation"]

    def quantize(weight_NK: Tensor, *amax: Tensor) -> Quantized:
        scale = torch.tensor([fp4.INPUT_GLOBAL_SCALE], device=weight_NK.device)
        return format_.quantize(weight_NK, *amax) | {"input_global_scale": scale}

    return replace(
        format_,
        quantize=quantize,
        round_activation=fp4.round_nv,
        activation_bits=4,
        input_activations={**format_.weights, "dynamic": "local", "observer": "static_minmax"},
        engine_kernels={"cuda": tuple(f"{backend}NvFp4LinearKernel" for backend in backends)},
    )


_FORMATS: dict[str, Callable[[QuantScheme], Format]] = {
    "w8a8_int8": _w8a8_int8,
    "w4a16": _w4a16,
    "w4a8": _w4a8,
    "fp8_tensor": _fp8_tensor,
    "fp8_channel": _fp8_channel,
    "fp8_block": _fp8_block,
    "mxfp4a16": _mxfp4a16,
    "mxfp4": _mxfp4,
    "nvfp4a16": _nvfp4a16,
    "nvfp4": _nvfp4,
}


def _quantize_packed_int4(weight_NK: Tensor, group_size: int) -> Quantized:
    q_NK, scale_NG = int4.quantize_weight(weight_NK, group_size)
    shape = torch.tensor(weight_NK.shape, dtype=torch.int64, device=weight_NK.device)
    return {"weight_packed": int4.pack(q_NK), "weight_scale": scale_NG, "weight_shape": shape}


def _int8_activation(x_MK: Tensor) -> Tensor:
    q_MK, scale_M1 = int8.quantize_activation(x_MK)
    return q_MK.float() * scale_M1

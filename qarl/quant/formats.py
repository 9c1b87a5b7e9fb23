"""The one table of formats: everything that differs between formats is a field of its entry.

Except `qarl.quant.scheme.TRAITS`, which the configuration reads without torch.
Suffixes: M tokens, K input features, N output features.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qarl.errors import ConfigError
from qarl.numerics import processor
from qarl.quant import engine_kernels as vllm
from qarl.quant import fp4, fp8, int4, int8
from qarl.quant.format import NO_LIMIT, Format, LearnerKernel, Quantized
from qarl.quant.learner_kernels import as_published, dequantized, w4a8_torch, w4a16_engine, w4a16_triton, w8a8_engine
from qarl.quant.scheme import QuantScheme, SchemeName

GROUP_SIZES = (32, 64, 128)


def format_of(scheme: QuantScheme) -> Format:
    """The format of a quantizing scheme. Raises ConfigError for a group size that the format does not have."""
    if scheme.grouped and scheme.group_size not in GROUP_SIZES:
        what = f"group size {scheme.group_size} is none of {', '.join(map(str, GROUP_SIZES))}"
        raise ConfigError(what, "rollout.group_size")
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


def engine_kernels(scheme: QuantScheme, device: str, experts: bool = True) -> tuple[str, ...]:
    """Class names of the vLLM kernels that implement `scheme` on `device`, those of experts too unless `experts` is
    False; none for `none`.

    Raises ConfigError: vLLM has none there.
    """
    if not scheme.quantizes:
        return ()
    format_ = format_of(scheme)
    if not format_.runs(device):
        what = f"vLLM has no {scheme.name} kernel on {device}"
        raise ConfigError(what, "rollout.scheme", f"take {_others(device)} or none there, or run on another device")
    kernels = (*format_.engine_kernels, *(format_.expert_kernels if experts else ()))
    return tuple(kernel.name for kernel in kernels if kernel.device == device)


def check_processor(scheme: QuantScheme, device: str) -> None:
    """Raises ConfigError: vLLM has `scheme` on CPU, but not for this machine's processor."""
    if device != "cpu" or not scheme.quantizes or processor.has_avx512():
        return
    if not format_of(scheme).runs(device, avx512=False):
        what = f"vLLM has no {scheme.name} kernel on a processor without AVX-512"
        hint = f"take {_others(device, avx512=False)} or none there, or run on another machine"
        raise ConfigError(what, "rollout.scheme", hint)


def _others(device: str, avx512: bool = True) -> str:
    return ", ".join(name for name, format_ in FORMATS.items() if format_.runs(device, avx512=avx512))


_DYNAMIC_INT8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}


def _named(names: str, quantize: Callable[..., tuple[Tensor, ...]]) -> Callable[..., Quantized]:
    return lambda *args: dict(zip(names.split(), quantize(*args), strict=True))


def _integer(bits: int, **args: Any) -> dict[str, Any]:
    return {"num_bits": bits, "type": "int", "symmetric": True, "dynamic": False, "observer": "minmax", **args}


def _float(bits: int, **args: Any) -> dict[str, Any]:
    return {"num_bits": bits, "type": "float", "symmetric": True, "dynamic": False, **args}


def _fp4(strategy: str, group_size: int, scale_dtype: str) -> dict[str, Any]:
    return _float(4, strategy=strategy, group_size=group_size, scale_dtype=scale_dtype, zp_dtype=scale_dtype)


# Bytes that rounding moves. Per input: to float32 6, abs 8, amax 4, times 8, round or clamp 8, to 8 bits 5; per output
# of the int8 GEMM: to float32 8, times 8 and 8, to bfloat16 6. On CPU, rates are measured with rounding.
_ROUND_INPUTS, _SCALE_OUTPUTS = 39, 30


def _w8a8_int8(scheme: QuantScheme) -> Format:
    torch_kernel = as_published("torch._int_mm", int8.w8a8_forward)
    rounding = (_ROUND_INPUTS, _SCALE_OUTPUTS)
    return Format(
        name=scheme.name,
        quantize=_named("weight weight_scale", int8.quantize_weight),
        dequantize=lambda q: q["weight"].float() * q["weight_scale"],
        round_activation=_int8_activation,
        compression="int-quantized",
        weights=_integer(8, strategy="channel"),
        input_activations=_DYNAMIC_INT8,
        block=(1, 0),
        scale_bytes=4,
        arithmetic="int8",
        engine_kernels=vllm.INT8,
        expert_method="CompressedTensorsW8A8Int8MoEMethod",
        expert_kernels=vllm.INT8_EXPERTS,
        learner_kernels=(
            LearnerKernel("engine", "cpu", w8a8_engine, "int8", prepared_bits=8),
            LearnerKernel("torch", "cpu", torch_kernel, "int8"),
            LearnerKernel("torch", "cuda", torch_kernel, "int8", 0, rounding, multiple=int8.CUDA_MULTIPLE),
        ),
        saturates_without_vnni=True,
    )


def _w4a16(scheme: QuantScheme) -> Format:
    return Format(
        name=scheme.name,
        quantize=partial(_quantize_packed_int4, group_size=scheme.group_size),
        dequantize=_int4_value,
        compression="pack-quantized",
        weights=_integer(4, strategy="group", group_size=scheme.group_size),
        block=(1, scheme.group_size),
        ones=0x99,
        extra_bytes=16,  # the weight's shape: two int64
        engine_kernels=vllm.INT4,
        expert_method="CompressedTensorsWNA16MoEMethod",
        expert_kernels=vllm.INT4_EXPERTS,
        learner_kernels=(
            LearnerKernel("engine", "cpu", w4a16_engine, "weight_only", 4, bfloat16_only=True, needs_avx512=True),
            LearnerKernel("torch", "cpu", dequantized(_int4_value), prepared_bits=16),
            LearnerKernel("triton", "cuda", w4a16_triton, "weight_only", bfloat16_only=True),
            LearnerKernel("torch", "cuda", dequantized(_int4_value), prepared_bits=16),
        ),
    )


def _w4a8(scheme: QuantScheme) -> Format:
    return Format(
        name=scheme.name,
        quantize=_named("weight weight_scale", partial(int4.quantize_weight, group_size=scheme.group_size)),
        dequantize=lambda q: int4.dequantize(q["weight"], q["weight_scale"]),
        round_activation=int4.round_activation,
        compression="int-quantized",
        weights=_integer(4, strategy="group", group_size=scheme.group_size),
        input_activations={**_DYNAMIC_INT8, "symmetric": False},
        block=(1, scheme.group_size),
        arithmetic="w4a8",
        engine_kernels=vllm.W4A8,
        expert_method="CompressedTensorsW4A8Int8MoEMethod",
        learner_kernels=(LearnerKernel("torch", "cpu", w4a8_torch, "w4a8", prepared_bits=4),),
        reload_alias="_packed",
    )


def _fp8_cuda(forward: Callable[..., Tensor], lowest: int, highest: int, *instead: SchemeName) -> LearnerKernel:
    return LearnerKernel(
        "torch",
        "cuda",
        as_published("torch._scaled_mm", forward, check=fp8.check_cuda_shape),
        "fp8",
        rounding_bytes=(_ROUND_INPUTS, 0),
        multiple=fp8.CUDA_MULTIPLE,
        bfloat16_only=True,
        capabilities=(lowest, highest),
        instead=instead,
    )


_FP8_ROWS = _fp8_cuda(fp8.row_wise_forward_cuda, 89, NO_LIMIT, "w8a8_int8", "w4a16")


def _fp8_channel(scheme: QuantScheme) -> Format:
    return Format(
        name=scheme.name,
        quantize=_named("weight weight_scale", fp8.quantize_channels),
        dequantize=lambda q: fp8.dequantize(q["weight"], q["weight_scale"]),
        round_activation=lambda x: fp8.dequantize(*fp8.quantize_activation(x)),
        compression="float-quantized",
        weights=_float(8, strategy="channel"),
        input_activations=_float(8, strategy="token", dynamic=True),
        block=(1, 0),
        scale_bytes=4,
        arithmetic="fp8",
        mantissa_bits=3,
        ones=0x38,
        engine_kernels=(*vllm.FP8_CPU, *vllm.FP8_CUDA),
        expert_method="CompressedTensorsW8A8Fp8MoEMethod",
        learner_kernels=(
            LearnerKernel("torch", "cpu", as_published("torch._scaled_mm", fp8.w8a8_forward), "fp8"),
            _FP8_ROWS,
        ),
    )


def _fp8_tensor(scheme: QuantScheme) -> Format:
    """vLLM's CPU build lacks the op that merges the scales of fused layers (`static_scaled_fp8_quant`)."""
    return replace(
        _fp8_channel(scheme),
        quantize=_named("weight weight_scale", fp8.quantize_tensor),
        weights=_float(8, strategy="tensor"),
        block=(0, 0),
        engine_kernels=vllm.FP8_CUDA,
        learner_kernels=(_FP8_ROWS,),
        joint=True,
    )


def _fp8_block(scheme: QuantScheme) -> Format:
    """vLLM's CPU kernel needs AMX, which qarl switches off (`vllm_patch`), and does not quantize activations."""
    return replace(
        _fp8_channel(scheme),
        quantize=_named("weight weight_scale", fp8.quantize_blocks),
        dequantize=lambda q: fp8.dequantize(q["weight"], q["weight_scale"], fp8.BLOCK, fp8.BLOCK),
        round_activation=lambda x: fp8.dequantize(*fp8.quantize_activation_groups(x), columns=fp8.BLOCK),
        weights=_float(8, strategy="block", block_structure=[fp8.BLOCK, fp8.BLOCK]),
        input_activations=_float(8, strategy="group", dynamic=True, group_size=fp8.BLOCK),
        block=(fp8.BLOCK, fp8.BLOCK),
        engine_kernels=vllm.FP8_BLOCK,
        learner_kernels=(_fp8_cuda(fp8.block_forward_cuda, 90, 90, "fp8_channel"),),
    )


def _mxfp4a16(scheme: QuantScheme) -> Format:
    return Format(
        name=scheme.name,
        quantize=_named("weight_packed weight_scale", fp4.quantize_mx),
        dequantize=_mx_value,
        compression="mxfp4-pack-quantized",
        weights=_fp4("group", fp4.MX_GROUP, "torch.uint8"),
        block=(1, fp4.MX_GROUP),
        scale_bytes=1,
        mantissa_bits=1,
        ones=0x22,
        engine_kernels=vllm.MXFP4A16,
        expert_method="CompressedTensorsW4A4Mxfp4MoEMethod",
        learner_kernels=(LearnerKernel("torch", "cuda", dequantized(_mx_value), prepared_bits=16),),
    )


def _mxfp4(scheme: QuantScheme) -> Format:
    format_ = _mxfp4a16(scheme)
    return replace(
        format_,
        round_activation=fp4.round_mx,
        input_activations={**format_.weights, "dynamic": True},
        arithmetic="fp4",
        engine_kernels=vllm.MXFP4,
        learner_kernels=(),
    )


def _nvfp4a16(scheme: QuantScheme) -> Format:
    return Format(
        name=scheme.name,
        quantize=_named("weight_packed weight_scale weight_global_scale", fp4.quantize_nv),
        dequantize=_nv_value,
        compression="nvfp4-pack-quantized",
        weights=_fp4("tensor_group", fp4.NV_GROUP, "torch.float8_e4m3fn"),
        block=(1, fp4.NV_GROUP),
        scale_bytes=1,
        extra_bytes=4,  # the global scale
        mantissa_bits=1,
        ones=0x22,
        engine_kernels=vllm.NVFP4A16,
        expert_method="CompressedTensorsW4A4Nvfp4MoEMethod",
        learner_kernels=(LearnerKernel("torch", "cuda", dequantized(_nv_value), prepared_bits=16),),
        joint=True,
    )


def _nvfp4(scheme: QuantScheme) -> Format:
    """Without calibration, the activations' global scale is `fp4.INPUT_GLOBAL_SCALE` in every layer."""
    format_ = _nvfp4a16(scheme)

    def quantize(weight_NK: Tensor, *amax: Tensor) -> Quantized:
        scale = torch.tensor([fp4.INPUT_GLOBAL_SCALE], device=weight_NK.device)
        return format_.quantize(weight_NK, *amax) | {"input_global_scale": scale}

    return replace(
        format_,
        quantize=quantize,
        round_activation=fp4.round_nv,
        input_activations={**format_.weights, "dynamic": "local", "observer": "static_minmax"},
        extra_bytes=8,  # two global scales
        arithmetic="fp4",
        engine_kernels=vllm.NVFP4,
        learner_kernels=(),
    )


def _quantize_packed_int4(weight_NK: Tensor, group_size: int) -> Quantized:
    q_NK, scale_NG = int4.quantize_weight(weight_NK, group_size)
    shape = torch.tensor(weight_NK.shape, dtype=torch.int64, device=weight_NK.device)
    return {"weight_packed": int4.pack(q_NK), "weight_scale": scale_NG, "weight_shape": shape}


def _int4_value(q: Quantized) -> Tensor:
    return int4.dequantize(int4.unpack(q["weight_packed"]), q["weight_scale"])


def _mx_value(q: Quantized) -> Tensor:
    return fp4.dequantize_mx(q["weight_packed"], q["weight_scale"])


def _nv_value(q: Quantized) -> Tensor:
    return fp4.dequantize_nv(q["weight_packed"], q["weight_scale"], q["weight_global_scale"])


def _int8_activation(x_MK: Tensor) -> Tensor:
    q_MK, scale_M1 = int8.quantize_activation(x_MK)
    return q_MK.float() * scale_M1


_FORMATS: dict[SchemeName, Callable[[QuantScheme], Format]] = {
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
FORMATS: dict[SchemeName, Format] = {name: make(QuantScheme(name)) for name, make in _FORMATS.items()}
"""Every format, with the default group size."""

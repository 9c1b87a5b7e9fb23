"""Which low-bit GEMM a learner runs, chosen by name and reported; never another one than asked for.

Suffixes: M tokens, K input features, N output features.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qarl.errors import KernelError
from qarl.numerics import engine_ops, processor
from qarl.quant import fp8, int4
from qarl.quant.formats import Format, Quantized, format_of
from qarl.quant.int8 import w8a8_forward
from qarl.quant.scheme import KernelKind, QuantScheme, SchemeName


@dataclass(frozen=True)
class Kernel:
    """`forward(x [M, K], prepare(quantized, bias [N] or None)) -> [M, N]` in x's dtype.

    `prepare` runs once per optimizer step: it brings the bytes into the layout that the GEMM reads.
    """

    name: str
    prepare: Callable[[Quantized, Tensor | None], Any]
    forward: Callable[[Tensor, Any], Tensor]


class StraightThrough(torch.autograd.Function):
    """Low-bit forward, straight-through backward (QaRL, arXiv 2604.07853, section 3).

        y = GEMM_lowbit(Q(x), Q(W)) + b      dL/dx = dL/dy W      dL/dW = dL/dy^T x      dL/db = sum_m dL/dy

    with the operands of the compute dtype; nothing more is saved than a plain linear saves.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_NK: Tensor, bias_N: Tensor | None, kernel: Kernel, prepared: Any) -> Tensor:
        ctx.save_for_backward(x, weight_NK)
        y_MN = kernel.forward(x.reshape(-1, x.shape[-1]), prepared)
        return y_MN.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, weight_NK = ctx.saved_tensors
        grad_x = matmul(grad, weight_NK) if ctx.needs_input_grad[0] else None
        grad_MN = grad.reshape(-1, grad.shape[-1])
        grad_w = matmul(grad_MN.t(), x.reshape(-1, x.shape[-1])) if ctx.needs_input_grad[1] else None
        grad_b = grad_MN.sum(0) if ctx.needs_input_grad[2] else None
        return grad_x, grad_w, grad_b, None, None


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b`, summed in float32 and rounded once.

    Processors without a bfloat16 GEMM multiply float32 copies: torch's own loop is six times slower there.
    """
    if a.device.type == "cpu" and a.dtype == torch.bfloat16 and not torch.cpu._is_avx512_bf16_supported():
        return (a.float() @ b.float()).to(a.dtype)
    return a @ b


def choose_kernel(
    scheme: QuantScheme, format_: Format, device: torch.device, dtype: torch.dtype, kind: KernelKind = "auto"
) -> Kernel:
    """The kernel of `kind` for `scheme` on `device`; `auto` takes the engine's own op, else torch's.

    Raises:
        KernelError: there is none; names format, device and the mend.
    """
    chosen = kernel_kind(scheme, device.type, dtype, kind)
    if chosen == "reference":
        return Kernel(
            "float32 reference", lambda q, bias: (q, bias), lambda x, prepared: format_.reference(x, *prepared)
        )
    return _KERNELS[scheme.name, chosen, device.type](dtype)


def kernel_kind(scheme: QuantScheme, device: str, dtype: torch.dtype, kind: KernelKind = "auto") -> KernelKind:
    """The kind that `choose_kernel` takes on a "cpu", which is this machine's, or a "cuda" device, which need not be
    here. Raises as it does."""
    if kind == "reference":
        return kind
    found = [k for name, k in low_bit_kernels(device) if name == scheme.name]
    lacks = ""
    if not engine_ops.available():
        lacks = " without vLLM"
    elif device == "cpu" and scheme.name == "w4a16" and not processor.has_avx512():
        lacks = " without AVX-512"
    if lacks:
        found = [k for k in found if k != "engine"]
    wanted = [k for k in found if kind in ("auto", k)]
    if not wanted:
        raise KernelError(
            f"no {'low-bit' if kind == 'auto' else f'{kind!r}'} kernel for {scheme.name} on {device}{lacks}",
            where="learner.kernel",
            mend=f"set it to {' or '.join(map(repr, [*found, 'reference']))}, or take another rollout.scheme",
        )
    if scheme.name == "w4a16" and wanted[0] in ("engine", "triton") and dtype != torch.bfloat16:
        raise KernelError(
            f"the {wanted[0]!r} W4A16 kernel on {device} computes in bfloat16", mend="set model.dtype=bfloat16"
        )
    return wanted[0]


def low_bit_kernels(device: str) -> list[tuple[SchemeName, KernelKind]]:
    """Every scheme and kind that has a kernel on `device`, the preferred kind of a scheme first."""
    return [(name, kind) for name, kind, where in _KERNELS if where == device]


def _w8a8_engine(dtype: torch.dtype) -> Kernel:
    def prepare(q: Quantized, bias_N: Tensor | None) -> engine_ops.W8A8Weight:
        return engine_ops.W8A8Weight(q["weight"], q["weight_scale"], bias_N, dtype)

    return Kernel("vllm.onednn_scaled_mm", prepare, engine_ops.w8a8_linear)


def _w8a8_torch(_: torch.dtype) -> Kernel:
    return Kernel(
        "torch._int_mm",
        lambda q, bias: (q["weight"], q["weight_scale"], bias),
        lambda x, prepared: w8a8_forward(x, *prepared),
    )


def _w4a16_engine(_: torch.dtype) -> Kernel:
    def prepare(q: Quantized, bias_N: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        layout = int4.engine_w4a16_layout(int4.unpack(q["weight_packed"]))
        return layout, q["weight_scale"].t().contiguous(), bias_N

    return Kernel("vllm.cpu_gemm_wna16", prepare, lambda x, prepared: engine_ops.w4a16_linear(x, *prepared))


def _w4a16_torch(_: torch.dtype) -> Kernel:
    """The engine's weight `round(q * s)` in the model's dtype, multiplied by torch: equal but for the GEMM's order."""

    def prepare(q: Quantized, bias_N: Tensor | None) -> tuple[Tensor, Tensor | None]:
        weight = int4.dequantize(int4.unpack(q["weight_packed"]), q["weight_scale"])
        return weight.to(q["weight_scale"].dtype), bias_N

    return Kernel("torch dequantized", prepare, lambda x, prepared: torch.nn.functional.linear(x, *prepared))


def _w4a16_triton(_: torch.dtype) -> Kernel:
    if importlib.util.find_spec("triton") is None:
        raise KernelError(
            "the W4A16 kernel on CUDA needs triton, which is not installed",
            where="learner.kernel",
            mend="install triton, or set it to 'torch' or 'reference'",
        )
    from qarl.quant.triton_w4a16 import w4a16_linear

    return Kernel(
        "triton W4A16",
        lambda q, bias: (q["weight_packed"], q["weight_scale"], bias),
        lambda x, prepared: w4a16_linear(x, *prepared),
    )


def _w4a8_torch(dtype: torch.dtype) -> Kernel:
    """torch's kernel, which the engine calls as well; it takes one-group layers in the model's dtype."""

    def prepare(q: Quantized, bias_N: Tensor | None) -> tuple[Tensor, int, int, int]:
        n, k = q["weight"].shape
        group = k // q["weight_scale"].shape[1]
        return int4.w4a8_pack(q["weight"], q["weight_scale"], bias_N), group, k, n

    def forward(x_MK: Tensor, prepared: tuple[Tensor, int, int, int]) -> Tensor:
        _, group, k, _ = prepared
        x = x_MK if group == k else x_MK.float()
        y_MN: Tensor = torch.ops.aten._dyn_quant_matmul_4bit(x, *prepared)
        return y_MN.to(dtype)

    return Kernel("torch._dyn_quant_matmul_4bit", prepare, forward)


def _fp8_torch(_: torch.dtype) -> Kernel:
    """torch's GEMM of fp8 values, which the engine calls as well."""
    return Kernel(
        "torch._scaled_mm",
        lambda q, bias: (q["weight"], q["weight_scale"], bias),
        lambda x, prepared: fp8.w8a8_forward(x, *prepared),
    )


def _fp8_cuda(scheme: SchemeName, dtype: torch.dtype) -> Kernel:
    fp8.check_cuda(scheme, torch.cuda.get_device_capability(), dtype)
    forward = fp8.block_forward_cuda if scheme == "fp8_block" else fp8.row_wise_forward_cuda

    def prepare(q: Quantized, bias_N: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        fp8.check_cuda_shape(scheme, q["weight"])
        return q["weight"], q["weight_scale"], bias_N

    return Kernel("torch._scaled_mm", prepare, lambda x, prepared: forward(x, *prepared))


def _fp4_torch(scheme: SchemeName, dtype: torch.dtype) -> Kernel:
    """The weight in the model's dtype (exact in bfloat16 for mxfp4), multiplied by torch."""
    format_ = format_of(QuantScheme(scheme))
    return Kernel(
        "torch dequantized",
        lambda q, bias: (format_.dequantize(q).to(dtype), bias),
        lambda x, prepared: torch.nn.functional.linear(x, *prepared),
    )


_KERNELS: dict[tuple[SchemeName, KernelKind, str], Callable[[torch.dtype], Kernel]] = {
    ("w8a8_int8", "engine", "cpu"): _w8a8_engine,
    ("w8a8_int8", "torch", "cpu"): _w8a8_torch,
    ("w8a8_int8", "torch", "cuda"): _w8a8_torch,
    ("w4a16", "engine", "cpu"): _w4a16_engine,
    ("w4a16", "torch", "cpu"): _w4a16_torch,
    ("w4a16", "triton", "cuda"): _w4a16_triton,
    ("w4a16", "torch", "cuda"): _w4a16_torch,
    ("w4a8", "torch", "cpu"): _w4a8_torch,
    ("fp8_channel", "torch", "cpu"): _fp8_torch,
    **{(name, "torch", "cuda"): partial(_fp8_cuda, name) for name in ("fp8_tensor", "fp8_channel", "fp8_block")},
    **{(name, "torch", "cuda"): partial(_fp4_torch, name) for name in ("mxfp4a16", "nvfp4a16")},
}
"""(scheme, kind, device) -> kernel, the preferred kind first."""

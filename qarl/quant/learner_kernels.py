"""The low-bit GEMMs that a learner may run. `qarl.quant.formats` says which format has which.

Suffixes: M tokens, K input features, N output features.
"""

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

from qarl.errors import KernelError
from qarl.numerics import engine_ops
from qarl.quant import int4
from qarl.quant.format import Kernel, Quantized


def w8a8_engine(dtype: torch.dtype) -> Kernel:
    def prepare(q: Quantized, bias_N: Tensor | None) -> engine_ops.W8A8Weight:
        return engine_ops.W8A8Weight(q["weight"], q["weight_scale"], bias_N, dtype)

    return Kernel("vllm.onednn_scaled_mm", prepare, engine_ops.w8a8_linear)


def w4a16_engine(_: torch.dtype) -> Kernel:
    def prepare(q: Quantized, bias_N: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        layout = int4.engine_w4a16_layout(int4.unpack(q["weight_packed"]))
        return layout, q["weight_scale"].t().contiguous(), bias_N

    return Kernel("vllm.cpu_gemm_wna16", prepare, lambda x, prepared: engine_ops.w4a16_linear(x, *prepared))


def w4a16_triton(dtype: torch.dtype) -> Kernel:
    if importlib.util.find_spec("triton") is None:
        what = "the W4A16 kernel on CUDA needs triton, which is not installed"
        raise KernelError(what, "learner.kernel", "install triton, or set it to 'torch' or 'reference'")
    from qarl.quant.triton_w4a16 import w4a16_linear

    return as_published("triton W4A16", w4a16_linear, "weight_packed")(dtype)


def w4a8_torch(dtype: torch.dtype) -> Kernel:
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


def as_published(
    name: str, forward: Callable[..., Tensor], weight: str = "weight", check: Callable[[Tensor], None] = lambda _: None
) -> Callable[[torch.dtype], Kernel]:
    """A kernel that reads the published weight and scale as they are; `check` refuses weights that it cannot take."""

    def prepare(q: Quantized, bias_N: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        check(q[weight])
        return q[weight], q["weight_scale"], bias_N

    return lambda _: Kernel(name, prepare, lambda x, prepared: forward(x, *prepared))


def dequantized(dequantize: Callable[[Quantized], Tensor]) -> Callable[[torch.dtype], Kernel]:
    """torch's GEMM of the weight in the model's dtype: the engine's weight-only kernels but for the order of sums."""
    return lambda dtype: Kernel(
        "torch dequantized",
        lambda q, bias: (dequantize(q).to(dtype), bias),
        lambda x, prepared: torch.nn.functional.linear(x, *prepared),
    )

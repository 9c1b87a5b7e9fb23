"""What this machine's processor has: vLLM, oneDNN and torch choose their CPU kernels by it, and so must qarl."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def has_avx512() -> bool:
    """Whether vLLM takes its AVX-512 kernels here; those for AVX2 round otherwise, and there are fewer of them."""
    return torch.cpu._is_avx512_supported()


def has_vnni() -> bool:
    """Whether int8 GEMMs sum exactly and fast here.

    Without VNNI oneDNN adds products of unsigned by signed bytes in pairs that saturate at 16 bits, and torch has a
    plain loop.
    """
    return torch.cpu._is_vnni_supported()


def has_bfloat16_gemm() -> bool:
    """Whether oneDNN and torch multiply bfloat16 by instructions for it."""
    return torch.cpu._is_avx512_bf16_supported()


def has_amx() -> bool:
    """Whether oneDNN has AMX here. torch's own question is answered with no in a process that runs vLLM's kernels."""
    return bool(torch.cpu.get_capabilities().get("amx_tile"))


@contextmanager
def threads(number: int) -> Iterator[None]:
    """Torch on `number` threads within, and on as many as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def cut_off(x: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 to bfloat16 without its lower half, towards zero; other dtypes as usual."""
    if dtype == torch.bfloat16:
        x = x.view(torch.int32).bitwise_and(-(2**16)).view(torch.float32)
    return x.to(dtype)


def round_as_engine(x: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 to `dtype` as vLLM's CPU kernels round here; to nearest on other devices. Differentiable."""
    if x.device.type != "cpu" or has_avx512():
        return x.to(dtype)
    return _CutOff.apply(x, dtype)


class _CutOff(torch.autograd.Function):
    """`cut_off`, whose derivative is that of a cast."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
        return cut_off(x, dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].float(), None

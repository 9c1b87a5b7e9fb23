"""Which low-bit GEMM a learner runs, chosen by name and reported, never replaced silently; and its gradients.

Suffixes: M tokens, K input features, N output features.
"""

from typing import Any

import torch
from torch import Tensor

from qarl.errors import KernelError
from qarl.numerics import engine_ops, processor
from qarl.numerics.dense import linear_gradients
from qarl.numerics.shards import all_reduce, input_slice
from qarl.quant.format import Format, Kernel, LearnerKernel, Quantized
from qarl.quant.formats import FORMATS
from qarl.quant.scheme import KernelKind, SchemeName


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
        return *linear_gradients(ctx, grads[0]), None, None


def in_shards(kernel: Kernel, shards: int) -> Kernel:
    """`kernel` as `shards` processes of an engine run it: each rounds and multiplies a slice of the inputs."""
    if shards == 1:
        return kernel

    def prepare(quantized: Quantized, bias_N: Tensor | None) -> list[Any]:
        slices = [input_slice(quantized, shard, shards) for shard in range(shards)]
        return [kernel.prepare(part, None if shard else bias_N) for shard, part in enumerate(slices)]

    def forward(x_MK: Tensor, prepared: list[Any]) -> Tensor:
        slices_MK = x_MK.chunk(shards, 1)
        return all_reduce([kernel.forward(x.contiguous(), part) for x, part in zip(slices_MK, prepared, strict=True)])

    return Kernel(kernel.name, prepare, forward)


def choose_kernel(format_: Format, device: torch.device, dtype: torch.dtype, kind: KernelKind = "auto") -> Kernel:
    """The kernel of `kind` for a format on `device`; `auto` takes the engine's own op, else triton's, else torch's.

    Raises KernelError: there is none; names format, device and what to set instead.
    """
    chosen = find_kernel(format_, device.type, dtype, kind)
    if chosen.instead:
        major, minor = torch.cuda.get_device_capability()
        check_capability(format_.name, chosen, 10 * major + minor)
    return chosen.make(dtype)


def find_kernel(format_: Format, device: str, dtype: torch.dtype, kind: KernelKind = "auto") -> LearnerKernel:
    """What `choose_kernel` takes on "cpu", which is this machine's, or on "cuda", which need not be here.

    Raises KernelError as it does, but for the GPU's compute capability.
    """
    if kind == "reference":
        return reference_kernel(format_, device)
    found = [kernel for kernel in format_.learner_kernels if kernel.device == device]
    lacks = ""
    if not engine_ops.available():
        found, lacks = [kernel for kernel in found if kernel.kind != "engine"], " without vLLM"
    elif any(kernel.needs_avx512 for kernel in found) and not processor.has_avx512():
        found, lacks = [kernel for kernel in found if not kernel.needs_avx512], " without AVX-512"
    fitting = [kernel for kernel in found if kind in ("auto", kernel.kind)]
    if not fitting:
        kinds = [*(kernel.kind for kernel in found), "reference"]
        what = f"no {'low-bit' if kind == 'auto' else f'{kind!r}'} kernel for {format_.name} on {device}{lacks}"
        hint = f"set it to {' or '.join(map(repr, kinds))}, or take another rollout.scheme"
        raise KernelError(what, "learner.kernel", hint)
    if fitting[0].bfloat16_only and dtype != torch.bfloat16:
        what = f"the {fitting[0].kind!r} {format_.name} kernel on {device} computes in bfloat16"
        raise KernelError(what, hint="set model.dtype=bfloat16")
    return fitting[0]


def reference_kernel(format_: Format, device: str) -> LearnerKernel:
    """Float32 arithmetic on the format's grids."""
    kernel = Kernel("float32 reference", lambda q, bias: (q, bias), lambda x, prepared: format_.reference(x, *prepared))
    return LearnerKernel("reference", device, lambda _: kernel, "fp32")


def check_capability(name: SchemeName, kernel: LearnerKernel, capability: int) -> None:
    """Raises KernelError when a GPU of this compute capability, times ten, cannot run `kernel`."""
    if kernel.fits(capability):
        return
    low, high = kernel.capabilities
    others = kernel.instead
    first = next(k for k in FORMATS[others[0]].learner_kernels if k.device == kernel.device)
    if not first.fits(capability):
        others = first.instead
    raise KernelError(
        f"torch's {name} kernel needs a GPU of compute capability {low / 10}{'' if low == high else ' or more'}, this "
        f"one has {capability / 10}",
        where="rollout.scheme",
        hint=f"take {' or '.join(others)} there",
    )


def low_bit_kernels(device: str) -> list[tuple[SchemeName, KernelKind]]:
    """Every format and kind that has a kernel on `device`, the preferred kind of a format first."""
    return [(name, k.kind) for name, format_ in FORMATS.items() for k in format_.learner_kernels if k.device == device]

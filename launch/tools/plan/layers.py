"""Which layers are quantized, with which of the engine's kernels, and why one cannot be.

Suffixes: K input features, N output features.
"""

from dataclasses import dataclass

from launch.tools.plan.devices import Device
from launch.tools.plan.memory import Variant
from launch.tools.plan.shapes import Matrix
from qarl.quant.format import NO_LIMIT, EngineKernel, Format


@dataclass(frozen=True)
class LayerRow:
    """The same layer of every block, or the same matrix of all their experts."""

    name: str
    count: int
    n: int
    k: int
    quantized: bool
    engine_kernel: str
    fault: str


def layer_rows(variant: Variant, device: Device) -> list[LayerRow]:
    """The matrices of a model, equal ones of different blocks together."""
    groups: dict[tuple[str, int, int, bool], list[Matrix]] = {}
    for matrix in variant.shapes.matrices:
        low_bit = variant.format_of(matrix) is not None
        groups.setdefault((matrix.pattern, matrix.n, matrix.k, low_bit), []).append(matrix)
    rows = []
    for (name, n, k, low_bit), matrices in groups.items():
        kernel = fault = ""
        count = sum(matrix.copies for matrix in matrices)
        if low_bit and variant.format_:
            kernel, fault = engine_kernel(variant.format_, device, n, k)
            if kernel and count > len(matrices):
                kernel = variant.format_.expert_method
        rows.append(LayerRow(name, count, n, k, low_bit, kernel, fault))
    return rows


def engine_kernel(format_: Format, device: Device, n: int, k: int) -> tuple[str, str]:
    """(vLLM's kernel, "") for a quantized layer [N, K] on `device`, or ("", why it cannot be quantized)."""
    group = format_.block[1]
    if group and k % group:
        return "", f"groups of {group} do not divide K={k}"
    kernels = [kernel for kernel in format_.engine_kernels if kernel.device == device.kind and kernel.planned]
    if not kernels:
        return "", f"the engine has no kernel on {device.kind}"
    lacks = {kernel.name: _lacks(kernel, device, n, k, group) for kernel in kernels}
    fitting = [name for name, lack in lacks.items() if not lack]
    if not fitting:
        return "", "; ".join(f"{name} {lack}" for name, lack in lacks.items())
    multiple = next((kernel.multiple for kernel in format_.learner_kernels if kernel.device == device.kind), 1)
    if k % multiple or n % multiple:
        return "", f"torch's GEMM on CUDA needs K and N divisible by {multiple}"
    return fitting[0], ""


def _lacks(kernel: EngineKernel, device: Device, n: int, k: int, group: int) -> str:
    """What keeps a kernel from a layer [N, K] on `device`, which is of its kind; empty for nothing."""
    low, high = kernel.capabilities
    if device.kind == "cuda" and not low <= device.capability <= high:
        needs = f"{low / 10:g} or more" if high == NO_LIMIT else f"{low / 10:g} to {high / 10:g}"
        return f"needs compute capability {needs}, {device.name} has {device.capability / 10:g}"
    if kernel.groups and group not in kernel.groups:
        return f"takes groups of {', '.join(map(str, kernel.groups))}, not {group}"
    if k % kernel.k_multiple or n % kernel.n_multiple:
        return f"needs K divisible by {kernel.k_multiple} and N by {kernel.n_multiple}"
    return ""

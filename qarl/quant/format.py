"""The fields of a low-bit format and of its kernels. `qarl.quant.formats` is the table.

Suffixes: M tokens, K input features, N output features.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
from torch import Tensor

from qarl.quant.scheme import Arithmetic, KernelKind, SchemeName

Quantized = dict[str, Tensor]
"""A quantized weight by the last parts of its names in a compressed-tensors checkpoint: `weight_scale`, ..."""
NO_LIMIT = 999


@dataclass(frozen=True)
class Kernel:
    """`forward(x [M, K], prepare(quantized, bias [N] or None)) -> [M, N]` in x's dtype.

    `prepare` runs once per optimizer step: it brings the bytes into the layout that the GEMM reads.
    """

    name: str
    prepare: Callable[[Quantized, Tensor | None], Any]
    forward: Callable[[Tensor, Any], Tensor]


@dataclass(frozen=True)
class LearnerKernel:
    """A kernel of a format: where it runs, what a plan counts for it, and `make(dtype)` for activations of a dtype."""

    kind: KernelKind
    device: str
    make: Callable[[torch.dtype], Kernel]
    arithmetic: Arithmetic | None = None
    """What its GEMM computes in; None for the model's dtype."""
    prepared_bits: int = 0
    """Bits per weight of its own layout, which it holds besides the published tensors."""
    rounding_bytes: tuple[int, int] = (0, 0)
    """Bytes that rounding moves per input and per output feature of a token, where a separate step does it."""
    multiple: int = 1
    """K and N must be divisible by it."""
    bfloat16_only: bool = False
    needs_avx512: bool = False
    capabilities: tuple[int, int] = (0, NO_LIMIT)
    """Lowest and highest CUDA compute capability, times ten."""
    instead: tuple[SchemeName, ...] = ()
    """Formats to take on GPUs outside `capabilities`."""

    def fits(self, capability: int) -> bool:
        return self.capabilities[0] <= capability <= self.capabilities[1]


@dataclass(frozen=True)
class EngineKernel:
    """A kernel of vLLM by class name, and the layers that it takes."""

    name: str
    device: str = "cuda"
    capabilities: tuple[int, int] = (80, NO_LIMIT)
    """Lowest and highest CUDA compute capability, times ten."""
    k_multiple: int = 1
    n_multiple: int = 1
    groups: tuple[int, ...] = ()
    """Group sizes that it takes; empty for any."""
    needs_avx512: bool = False
    bfloat16_only: bool = False
    planned: bool = True
    """`qarl plan` expects it. The others need an optional package, or replace one that is missing."""

    def runs(self, device: str, dtype: torch.dtype, avx512: bool) -> bool:
        """Whether it runs on `device`, of whatever compute capability, in a model of `dtype`."""
        fits = (avx512 or not self.needs_avx512) and (dtype == torch.bfloat16 or not self.bfloat16_only)
        return self.device == device and fits


@dataclass(frozen=True, kw_only=True)
class Format:
    """How one linear layer is quantized. All functions are pure."""

    name: SchemeName
    quantize: Callable[..., Quantized]
    """The checkpoint's tensors of a weight [N, K], all on its device."""
    dequantize: Callable[[Quantized], Tensor]
    """Their value: float32 [N, K]."""
    round_activation: Callable[[Tensor], Tensor] = Tensor.float
    """float32 [M, K] on the activation grid; the activation itself in weight-only formats."""
    compression: str
    weights: dict[str, Any]
    input_activations: dict[str, Any] | None = None
    """`compression`, `weights` and `input_activations` describe the format in compressed-tensors' words."""
    block: tuple[int, int]
    """(N, K) of the weights that share a scale; 0 for all."""
    scale_bytes: int = 0
    """Bytes of a published scale; 0 for those of the model's dtype."""
    arithmetic: Arithmetic = "weight_only"
    """What the engine's GEMM computes in."""
    engine_kernels: tuple[EngineKernel, ...]
    """vLLM's kernels that implement it. Another choice of the engine is an error."""
    expert_method: str
    """vLLM's class for a stack of experts in this format."""
    expert_kernels: tuple[EngineKernel, ...] = ()
    """vLLM's kernels for experts that qarl has compared with its own."""
    learner_kernels: tuple[LearnerKernel, ...] = ()
    """The preferred one of a device first."""
    extra_bytes: int = 0
    """Bytes of a published layer besides weights and scales."""
    joint: bool = False
    """One scale covers the weights of all layers that the engine fuses: the engine keeps a single scale for them.
    `quantize(weight, amax)` takes the largest magnitude of these weights."""
    saturates_without_vnni: bool = False
    """The sums of the engine's CPU kernel saturate on processors without VNNI."""
    mantissa_bits: int = 0
    """Of the weights' codes; 0 for integers."""
    ones: int = 1
    """A byte of codes that are all 1."""
    reload_alias: str = ""
    """A second suffix of the int8 weight's name: vLLM registers it under two names and reloads each for itself."""

    @property
    def weight_bits(self) -> int:
        return int(self.weights["num_bits"])

    @property
    def activation_bits(self) -> int:
        return 16 if self.input_activations is None else int(self.input_activations["num_bits"])

    @property
    def stored_bits(self) -> int:
        """Bits of a published code."""
        return 8 if self.compression == "int-quantized" else self.weight_bits  # that one stores int4 as int8

    def codes(self, quantized: Quantized) -> Tensor:
        """The codes of a quantized weight as bytes, of two codes each where `stored_bits` is 4. No copy."""
        return quantized[_codes_key(quantized)].view(torch.uint8)

    def differing(self, codes: Tensor, others: Tensor) -> int:
        """How many codes differ between two results of `codes`."""
        bits = codes ^ others
        halves = (bits,) if self.stored_bits == 8 else (bits & 15, bits >> 4)
        return sum(int(half.count_nonzero()) for half in halves)

    def steps(self, quantized: Quantized, n: int, stride: int) -> Tensor:
        """Distance from each value of every `stride`-th of `n` rows to the next one on the grid: float32 [n/stride, K].

        On a grid of floats it grows with the value: 2^(e - mantissa bits), of values of 2^e and more, times the scale.
        """
        if self.block[0] > 1:  # rows share scales
            return self._steps(quantized)[::stride]
        return self._steps({key: tensor[::stride] if len(tensor) == n else tensor for key, tensor in quantized.items()})

    def _steps(self, quantized: Quantized) -> Tensor:
        key = _codes_key(quantized)
        ones = torch.full_like(quantized[key].view(torch.uint8), self.ones).view(quantized[key].dtype)
        scale_NK = self.dequantize(quantized | {key: ones})
        if not self.mantissa_bits:
            return scale_NK
        smallest = 2 - 2 ** (self.weight_bits - self.mantissa_bits - 2)  # exponent
        codes_NK = self.dequantize(quantized).abs() / scale_NK * (1 + 2**-10)  # above what rounding took
        return torch.exp2(codes_NK.log2().floor().clamp(min=smallest) - self.mantissa_bits) * scale_NK

    @property
    def k_multiple(self) -> int:
        """K must be divisible by it."""
        return self.block[1] or 1

    @property
    def n_multiple(self) -> int:
        """N of a layer that the engine fuses with a following one must be divisible by it."""
        return self.block[0] or 1

    def runs(self, device: str, dtype: torch.dtype = torch.bfloat16, avx512: bool = True) -> bool:
        """Whether vLLM has a kernel for linear layers."""
        return any(kernel.runs(device, dtype, avx512) for kernel in self.engine_kernels)

    def runs_experts(self, device: str, dtype: torch.dtype, avx512: bool) -> bool:
        """Whether vLLM has a known kernel for experts."""
        return any(kernel.runs(device, dtype, avx512) for kernel in self.expert_kernels)

    def reference(self, x_MK: Tensor, quantized: Quantized, bias_N: Tensor | None) -> Tensor:
        """The layer in float32 arithmetic, rounded once to x's dtype: what every kernel is compared with. [M, N]."""
        bias = None if bias_N is None else bias_N.float()
        y_MN = torch.nn.functional.linear(self.round_activation(x_MK), self.dequantize(quantized), bias)
        return y_MN.to(x_MK.dtype)

    def published_bytes(self, n: int, k: int, dtype_bytes: int) -> int:
        """Bytes of a layer [N, K] in a checkpoint and on the wire, without its bias; `dtype_bytes`: the model's."""
        return n * k * self.stored_bits // 8 + self._bytes_of_scales(n, k, dtype_bytes) + self.extra_bytes

    def engine_bytes(self, n: int, k: int, dtype_bytes: int) -> int:
        """Bytes of a layer [N, K] in the engine's memory: what a decode step reads of it."""
        return n * k * self.weight_bits // 8 + self._bytes_of_scales(n, k, dtype_bytes)

    def _bytes_of_scales(self, n: int, k: int, dtype_bytes: int) -> int:
        rows, columns = (ceil(extent / (size or extent)) for extent, size in zip((n, k), self.block, strict=True))
        return rows * columns * (self.scale_bytes or dtype_bytes)


def _codes_key(quantized: Quantized) -> str:
    return "weight" if "weight" in quantized else "weight_packed"

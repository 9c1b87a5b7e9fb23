"""What a plan needs to know of each format: bytes of a stored layer, what its GEMM computes in, which kernel runs it.

`docs/plan.md` gives the sources. Suffixes: K input features, N output features.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Literal

from launch.tools.plan.devices import Arithmetic, Device
from qarl.quant.scheme import KernelKind, SchemeName

HIGHEST = 999


@dataclass(frozen=True)
class EngineKernel:
    """A low-bit kernel of vLLM 0.32, by class name, and the layers that it takes."""

    name: str
    kind: Literal["cpu", "cuda"] = "cuda"
    capabilities: tuple[int, int] = (80, HIGHEST)
    """Lowest and highest CUDA compute capability, times ten."""
    k_multiple: int = 1
    n_multiple: int = 1
    groups: tuple[int, ...] = ()
    """Group sizes that it takes; empty for any."""

    def lacks(self, device: Device, n: int, k: int, group: int) -> str:
        """What keeps it from a layer [N, K] on `device`, which is of its kind; empty for nothing."""
        low, high = self.capabilities
        if device.kind == "cuda" and not low <= device.capability <= high:
            needs = f"{low / 10:g} or more" if high == HIGHEST else f"{low / 10:g} to {high / 10:g}"
            return f"needs compute capability {needs}, {device.name} has {device.capability / 10:g}"
        if self.groups and group not in self.groups:
            return f"takes groups of {', '.join(map(str, self.groups))}, not {group}"
        if k % self.k_multiple or n % self.n_multiple:
            return f"needs K divisible by {self.k_multiple} and N by {self.n_multiple}"
        return ""


@dataclass(frozen=True)
class PlanFormat:
    """One format.

    A layer [N, K] is published as N x K x `stored_bits` / 8 bytes, a scale of `scale_bytes` (0: of the model's dtype)
    for every `block` of (N, K) weights (0: the whole extent), and `extra_bytes`. The engine holds `engine_bits` a
    weight (0: as stored). `experts` names vLLM's method for stacks of experts. `torch_multiple` must divide K and N for
    torch's GEMM on CUDA.
    """

    arithmetic: Arithmetic
    stored_bits: int
    activation_bits: int
    block: tuple[int, int]
    scale_bytes: int
    kernels: tuple[EngineKernel, ...]
    experts: str
    extra_bytes: int = 0
    engine_bits: int = 0
    torch_multiple: int = 1

    def published_bytes(self, n: int, k: int, dtype_bytes: int) -> int:
        """Bytes of a quantized layer [N, K] in a checkpoint and on the wire, without its bias."""
        return n * k * self.stored_bits // 8 + self._scales(n, k) * (self.scale_bytes or dtype_bytes) + self.extra_bytes

    def engine_bytes(self, n: int, k: int, dtype_bytes: int) -> int:
        """Bytes of a quantized layer [N, K] in the engine's memory: what a decode step reads of it."""
        bits = self.engine_bits or self.stored_bits
        return n * k * bits // 8 + self._scales(n, k) * (self.scale_bytes or dtype_bytes)

    def fault(self, device: Device, n: int, k: int) -> str:
        """Why a layer [N, K] cannot be quantized on `device`; empty when it can."""
        group = self.block[1]
        if group and k % group:
            return f"groups of {group} do not divide K={k}"
        if not self._on(device):
            return f"the engine has no kernel on {device.kind}"
        if not self.engine_kernel(device, n, k):
            return "; ".join(f"{kernel.name} {kernel.lacks(device, n, k, group)}" for kernel in self._on(device))
        if device.kind == "cuda" and (k % self.torch_multiple or n % self.torch_multiple):
            return f"torch's GEMM on CUDA needs K and N divisible by {self.torch_multiple}"
        return ""

    def engine_kernel(self, device: Device, n: int, k: int) -> str:
        """The engine's kernel of a layer [N, K] on `device`; empty for none."""
        return next((kernel.name for kernel in self._on(device) if not kernel.lacks(device, n, k, self.block[1])), "")

    @property
    def expert_method(self) -> str:
        """The engine's class for a stack of experts."""
        return f"CompressedTensors{self.experts}MoEMethod"

    def _on(self, device: Device) -> list[EngineKernel]:
        return [kernel for kernel in self.kernels if kernel.kind == device.kind]

    def _scales(self, n: int, k: int) -> int:
        rows, columns = (ceil(extent / (size or extent)) for extent, size in zip((n, k), self.block, strict=True))
        return rows * columns


def plan_format(name: str, group_size: int = 128) -> PlanFormat:
    """The format called `name` (a `rollout.scheme` that quantizes); `group_size` is that of the int4 formats."""
    return _formats(group_size)[name]


FORMATS = (
    *("w8a8_int8", "w4a16", "w4a8", "fp8_tensor", "fp8_channel", "fp8_block"),
    *("mxfp4", "mxfp4a16", "nvfp4", "nvfp4a16"),
)
"""Names of `plan_format`."""


def _formats(group_size: int) -> dict[str, PlanFormat]:
    # arithmetic, stored bits, activation bits, block, scale bytes, kernels, method of experts
    return {
        "w8a8_int8": PlanFormat("int8", 8, 8, (1, 0), 4, _INT8, "W8A8Int8", torch_multiple=8),
        "w4a16": PlanFormat("weight_only", 4, 16, (1, group_size), 0, _INT4, "WNA16", extra_bytes=16),
        "w4a8": PlanFormat("w4a8", 8, 8, (1, group_size), 0, _W4A8, "W4A8Int8", engine_bits=4),
        "fp8_tensor": PlanFormat("fp8", 8, 8, (0, 0), 4, _FP8, "W8A8Fp8", torch_multiple=16),
        "fp8_channel": PlanFormat("fp8", 8, 8, (1, 0), 4, _FP8_CHANNEL, "W8A8Fp8", torch_multiple=16),
        "fp8_block": PlanFormat("fp8", 8, 8, (128, 128), 4, _FP8_BLOCK, "W8A8Fp8", torch_multiple=16),
        "mxfp4": PlanFormat("fp4", 4, 4, (1, 32), 1, _MXFP4, "W4A4Mxfp4"),
        "mxfp4a16": PlanFormat("weight_only", 4, 16, (1, 32), 1, _MXFP4A16, "W4A4Mxfp4"),
        "nvfp4": PlanFormat("fp4", 4, 4, (1, 16), 1, _NVFP4, "W4A4Nvfp4", extra_bytes=8),
        "nvfp4a16": PlanFormat("weight_only", 4, 16, (1, 16), 1, _NVFP4A16, "W4A4Nvfp4", extra_bytes=4),
    }


# On later devices than listed, vLLM either fails (int8: its CUTLASS kernel claims Blackwell and has nothing for it,
# vllm-project/vllm#54311) or runs the layer with unquantized activations (fp8, fp4 on earlier ones), which is another
# format than was asked for.
_INT8 = (
    EngineKernel("CPUInt8ScaledMMLinearKernel", "cpu"),
    EngineKernel("CutlassInt8ScaledMMLinearKernel", capabilities=(75, 90)),
)
_INT4 = (
    EngineKernel("CPUWNA16LinearKernel", "cpu", k_multiple=32, n_multiple=32),
    EngineKernel("MacheteLinearKernel", capabilities=(90, 90), k_multiple=64, n_multiple=128, groups=(64, 128)),
    EngineKernel("MarlinLinearKernel", groups=(32, 64, 128)),
)
_W4A8 = (EngineKernel("Dynamic4bitLinearKernel", "cpu"),)
_FP8 = (EngineKernel("CutlassFP8ScaledMMLinearKernel", capabilities=(89, HIGHEST)),)
_FP8_CHANNEL = (EngineKernel("ChannelWiseTorchFP8ScaledMMLinearKernel", "cpu"), *_FP8)
_FP8_BLOCK = (EngineKernel("CutlassFp8BlockScaledMMKernel", capabilities=(90, HIGHEST)),)
_MXFP4 = (EngineKernel("FlashInferMxFp4LinearKernel", capabilities=(100, HIGHEST)),)
_MXFP4A16 = (EngineKernel("MarlinMxFp4LinearKernel"),)
_NVFP4 = (EngineKernel("CutlassNvFp4LinearKernel", capabilities=(100, HIGHEST)),)
_NVFP4A16 = (EngineKernel("MarlinNvFp4LinearKernel"),)


@dataclass(frozen=True)
class LearnerKernel:
    """A kernel of `qarl.quant.kernels`: what it computes in (empty: the model's dtype), bits per weight that it holds
    besides the published tensors, and bytes that rounding moves per input and per output feature of a token, where
    torch rounds apart from the GEMM (on CPU, rates are measured with it)."""

    arithmetic: Arithmetic | None
    prepared_bits: int = 0
    rounding_bytes: tuple[int, int] = (0, 0)


# Per input: to float32 6 bytes, abs 8, amax 4, times 8, round or clamp 8, to 8 bits 5; per output of the int8 GEMM: to
# float32 8, times 8 and 8, to bfloat16 6.
_FP8_CUDA = LearnerKernel("fp8", rounding_bytes=(39, 0))
_DEQUANTIZED = LearnerKernel(None, prepared_bits=16)
REFERENCE = LearnerKernel("fp32")
LEARNER_KERNELS: dict[tuple[SchemeName, KernelKind, str], LearnerKernel] = {
    ("w8a8_int8", "engine", "cpu"): LearnerKernel("int8", prepared_bits=8),
    ("w8a8_int8", "torch", "cpu"): LearnerKernel("int8"),
    ("w8a8_int8", "torch", "cuda"): LearnerKernel("int8", rounding_bytes=(39, 30)),
    ("w4a16", "engine", "cpu"): LearnerKernel("weight_only", prepared_bits=4),
    ("w4a16", "torch", "cpu"): _DEQUANTIZED,
    ("w4a16", "triton", "cuda"): LearnerKernel("weight_only"),
    ("w4a16", "torch", "cuda"): _DEQUANTIZED,
    ("w4a8", "torch", "cpu"): LearnerKernel("w4a8", prepared_bits=4),
    ("fp8_channel", "torch", "cpu"): LearnerKernel("fp8"),
    ("fp8_tensor", "torch", "cuda"): _FP8_CUDA,
    ("fp8_channel", "torch", "cuda"): _FP8_CUDA,
    ("fp8_block", "torch", "cuda"): _FP8_CUDA,
    ("mxfp4a16", "torch", "cuda"): _DEQUANTIZED,
    ("nvfp4a16", "torch", "cuda"): _DEQUANTIZED,
}
"""By scheme, kind and device, as `qarl.quant.kernels` has them."""

"""Devices that a run can be planned for: published peaks of GPUs, and one core of a CPU as measured."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from launch import limits
from qarl.errors import ConfigError
from qarl.quant.scheme import Arithmetic

TERA, GIGA, MIB = 1e12, 1e9, 2**20

# Assumptions for GPUs; none was measured here (docs/plan.md).
BANDWIDTH_EFFICIENCY = 0.9
"""vLLM names about 5 ms for a decode step of Llama-3.1-8B on one H100 (blog "vLLM V1", 2025): 15.0 GB of weights read
at 0.9 of the peak."""
GEMM_EFFICIENCY = 0.7
"""Assumed: large bfloat16 GEMMs on Hopper reach 0.6 to 0.8 of the peak."""
LEARNER_EFFICIENCY = 0.4
"""Model FLOPs utilisation of training on H100: 0.38 to 0.43 (Llama 3, arXiv 2407.21783, table 4)."""
WEIGHT_ONLY_RATE = 0.9
"""Of the bfloat16 rate: MARLIN is 10% slower than float16 where arithmetic is the limit (arXiv 2408.11743)."""
STEP_S, SEQUENCE_S = 2e-3, 1e-5
"""Assumed: scheduling, sampling, and the small kernels between the GEMMs."""


@dataclass(frozen=True)
class Device:
    """One GPU, or one core of a CPU with the memory of the whole machine.

    Kernels reach rate x `gemm_efficiency` in the engine, rate x `learner_efficiency` in training and bandwidth x
    `bandwidth_efficiency`. Besides its arithmetic, an engine step takes `step_s` + batch x `sequence_s`.
    """

    name: str
    kind: Literal["cpu", "cuda"]
    capability: int
    """CUDA compute capability times ten; 0 for a CPU."""
    memory: float
    """Bytes."""
    bandwidth: float
    """Bytes/s of its memory."""
    link: float
    """Bytes/s between its memory and the host's, one direction."""
    rates: Mapping[Arithmetic, float]
    """Dense FLOP/s. Arithmetic without an entry: the device has no units for it, or no kernel was measured."""
    source: str
    overlaps: bool = True
    """Loading and arithmetic overlap: an operation takes the longer of both. Otherwise it takes their sum."""
    bandwidth_efficiency: float = BANDWIDTH_EFFICIENCY
    gemm_efficiency: float = GEMM_EFFICIENCY
    learner_efficiency: float = LEARNER_EFFICIENCY
    step_s: float = STEP_S
    sequence_s: float = SEQUENCE_S

    def seconds(self, moved: float, flops: float, arithmetic: Arithmetic) -> float:
        """Roofline of one engine operation that moves `moved` bytes and computes `flops`."""
        loading = moved / (self.bandwidth * self.bandwidth_efficiency)
        computing = flops / (self.rates[arithmetic] * self.gemm_efficiency)
        return max(loading, computing) if self.overlaps else loading + computing


def device_called(name: str) -> Device:
    """The device of that name. Raises ConfigError for an unknown one."""
    if name == "cpu":
        from qarl.numerics import processor  # late: it imports torch

        parts = {"AVX512-VNNI": processor.has_vnni(), "AVX512-BF16": processor.has_bfloat16_gemm()}
        lacks = " and ".join(part for part, is_there in parts.items() if not is_there)
        source = CPU.source + f" (slower: this processor has no {lacks})" * bool(lacks)
        return replace(CPU, memory=float(limits.memory()), source=source)
    found = {gpu.name: gpu for gpu in GPUS}
    if name not in found:
        raise ConfigError(f"'{name}' is none of cpu, {', '.join(found)}", where="--device")
    return found[name]


def _gpu(
    name: str, capability: int, mib: int, bandwidth: float, link: float, rates: Mapping[Arithmetic, float], source: str
) -> Device:
    """A row of published figures: `bandwidth` in TB/s, `link` in GB/s, `rates` in TFLOP/s."""
    peaks: dict[Arithmetic, float] = {arithmetic: rate * TERA for arithmetic, rate in rates.items()}
    peaks["weight_only"] = WEIGHT_ONLY_RATE * peaks["bf16"]
    return Device(name, "cuda", capability, mib * MIB, bandwidth * TERA, link * GIGA, peaks, source)


# Memory as nvidia-smi shows it. Rates without sparsity, of which data sheets give twice as much; PCIe in one direction.
_HOPPER: dict[Arithmetic, float] = {"fp32": 67, "bf16": 989, "int8": 1979, "fp8": 1979}
_ADA: dict[Arithmetic, float] = {"fp32": 91.6, "bf16": 362, "int8": 733, "fp8": 733}
_B200: dict[Arithmetic, float] = {"fp32": 75, "bf16": 2250, "int8": 4500, "fp8": 4500, "fp4": 9000}
GPUS = (
    # name, compute capability, MiB, TB/s, GB/s of the link, TFLOP/s, source
    _gpu("a100", 80, 81920, 2.039, 32, {"fp32": 19.5, "bf16": 312, "int8": 624}, "NVIDIA A100 data sheet, 80 GB SXM"),
    _gpu("h100", 90, 81559, 3.35, 64, _HOPPER, "NVIDIA H100 data sheet, SXM"),
    _gpu("h200", 90, 143771, 4.8, 64, _HOPPER, "NVIDIA H200 data sheet, SXM"),
    _gpu("l40s", 89, 46068, 0.864, 32, _ADA, "NVIDIA L40S data sheet"),
    _gpu("b200", 100, 183359, 7.7, 64, _B200, "NVIDIA Blackwell data sheet, HGX B200"),
)

CPU = Device(
    name="cpu",
    kind="cpu",
    capability=0,
    memory=0.0,
    bandwidth=18e9,
    link=float("inf"),
    rates={"fp32": 88e9, "bf16": 397e9, "int8": 712e9, "weight_only": 147e9, "fp8": 64e9},
    source="speed of one core of a VM with AVX512-VNNI and AVX512-BF16; --measure takes this machine's",
    overlaps=False,
    bandwidth_efficiency=1.0,
    gemm_efficiency=1.0,
    learner_efficiency=1.0,
    step_s=8e-3,
    sequence_s=5e-5,
)
"""Rates differ several times between hosts: `qarl plan --measure` takes this host's."""
DEVICES = ("cpu", *(gpu.name for gpu in GPUS))
"""Every name that `device_called` knows."""

"""The low-bit kernels of vLLM 0.32 that implement a format, by class name, and what they take.

Which of them runs is vLLM's choice. On GPUs outside `capabilities` vLLM either fails (int8: its CUTLASS kernel claims
Blackwell and has nothing for it, vllm-project/vllm#54311) or leaves the activations alone (fp8 and fp4 on older GPUs),
which is another format.
"""

from qarl.quant.format import NO_LIMIT, EngineKernel
from qarl.quant.int4 import CPU_MULTIPLE


def also(*names: str) -> tuple[EngineKernel, ...]:
    """CUDA kernels that vLLM may select as well; a plan does not expect them."""
    return tuple(EngineKernel(name, planned=False) for name in names)


INT8 = (
    EngineKernel("CPUInt8ScaledMMLinearKernel", "cpu"),
    EngineKernel("CutlassInt8ScaledMMLinearKernel", capabilities=(75, 90)),
    *also("TritonInt8ScaledMMLinearKernel"),
)
INT8_EXPERTS = (
    EngineKernel("CPUExpertsInt8", "cpu", needs_avx512=True, bfloat16_only=True),
    EngineKernel("TritonExperts"),
)
INT4 = (
    EngineKernel("CPUWNA16LinearKernel", "cpu", k_multiple=CPU_MULTIPLE, n_multiple=CPU_MULTIPLE, needs_avx512=True),
    EngineKernel("MacheteLinearKernel", capabilities=(90, 90), k_multiple=64, n_multiple=128, groups=(64, 128)),
    EngineKernel("MarlinLinearKernel", groups=(32, 64, 128)),
)
INT4_EXPERTS = (EngineKernel("MarlinExperts"),)
W4A8 = (EngineKernel("Dynamic4bitLinearKernel", "cpu"),)
FP8_CPU = (EngineKernel("ChannelWiseTorchFP8ScaledMMLinearKernel", "cpu"),)
FP8_CUDA = (
    EngineKernel("CutlassFP8ScaledMMLinearKernel", capabilities=(89, NO_LIMIT)),
    *also("ChannelWiseTorchFP8ScaledMMLinearKernel"),
)
FP8_BLOCK = (
    *also("FlashInferFp8DeepGEMMDynamicBlockScaledKernel", "DeepGemmFp8BlockScaledMMKernel"),
    EngineKernel("CutlassFp8BlockScaledMMKernel", capabilities=(90, NO_LIMIT)),
    *also("TritonFp8BlockScaledMMKernel", "BlockWiseTorchFP8ScaledMMLinearKernel"),
)
MXFP4A16 = (EngineKernel("MarlinMxFp4LinearKernel"),)
MXFP4 = (
    EngineKernel("FlashInferMxFp4LinearKernel", capabilities=(100, NO_LIMIT)),
    *also("B12xMxFp4LinearKernel", "EmulationMxfp4LinearKernel"),
)
NVFP4A16 = (
    EngineKernel("MarlinNvFp4LinearKernel"),
    *also("FlashInferCuteDslNvFp4W4A16LinearKernel", "B12xNvFp4W4A16LinearKernel"),
)
_FLASHINFER = ("CuteDsl", "Cutlass", "B12x", "Trtllm", "Cudnn")
NVFP4 = (
    *also(*(f"FlashInfer{backend}NvFp4LinearKernel" for backend in _FLASHINFER)),
    EngineKernel("CutlassNvFp4LinearKernel", capabilities=(100, NO_LIMIT)),
    *also(*(f"{backend}NvFp4LinearKernel" for backend in ("Fbgemm", "B12x", "Torch", "Emulation"))),
)

"""Kernels against the engine's sources; why a layer cannot run; the table of devices."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from launch.tools.plan.devices import CPU, GPUS, Device, device_called
from launch.tools.plan.layers import engine_kernel
from qarl.errors import ConfigError
from qarl.quant.formats import FORMATS, format_of
from qarl.quant.scheme import QuantScheme, SchemeName


@pytest.mark.parametrize("name", FORMATS)
def test_a_plan_expects_one_of_the_formats_kernels_wherever_it_has_one(name: SchemeName) -> None:
    kernels = FORMATS[name].engine_kernels
    assert {kernel.device for kernel in kernels if kernel.planned} == {kernel.device for kernel in kernels}


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs the engine's sources")
def test_kernels_are_the_engines() -> None:
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    executor = Path(spec.origin).parent / "model_executor"
    files = [*executor.glob("kernels/linear/**/*.py"), *executor.glob("layers/quantization/compressed_tensors/**/*.py")]
    files += executor.glob("layers/fused_moe/**/*.py")
    sources = "\n".join(file.read_text() for file in files)
    for format_ in FORMATS.values():
        kernels = (*format_.engine_kernels, *format_.expert_kernels)
        for kernel in (*(kernel.name for kernel in kernels), format_.expert_method):
            assert f"class {kernel}(" in sources


def gpu(name: str) -> Device:
    return next(gpu for gpu in GPUS if gpu.name == name)


@pytest.mark.parametrize(
    ("name", "device", "n", "k", "fault"),
    [
        ("w4a16", "h100", 4096, 4160, "groups of 128 do not divide K=4160"),
        ("fp8_block", "h100", 4096, 4100, "groups of 128 do not divide K=4100"),
        ("w8a8_int8", "h100", 4096, 4100, "torch's GEMM on CUDA needs K and N divisible by 8"),
        (
            "w8a8_int8",
            "b200",
            4096,
            4096,
            "CutlassInt8ScaledMMLinearKernel needs compute capability 7.5 to 9, b200 has 10",
        ),
        (
            "fp8_channel",
            "a100",
            64,
            64,
            "CutlassFP8ScaledMMLinearKernel needs compute capability 8.9 or more, a100 has 8",
        ),
        (
            "fp8_block",
            "l40s",
            128,
            128,
            "CutlassFp8BlockScaledMMKernel needs compute capability 9 or more, l40s has 8.9",
        ),
        ("nvfp4", "h200", 64, 64, "CutlassNvFp4LinearKernel needs compute capability 10 or more, h200 has 9"),
        ("mxfp4", "cpu", 64, 64, "the engine has no kernel on cpu"),
        ("w4a8", "h100", 128, 128, "the engine has no kernel on cuda"),
        ("w4a16", "cpu", 48, 128, "CPUWNA16LinearKernel needs K divisible by 32 and N by 32"),
    ],
)
def test_why_a_layer_cannot_run(name: SchemeName, device: str, n: int, k: int, fault: str) -> None:
    assert engine_kernel(FORMATS[name], CPU if device == "cpu" else gpu(device), n, k) == ("", fault)


@pytest.mark.parametrize(
    ("name", "group", "device", "n", "kernel"),
    [
        ("w4a16", 128, "h100", 4096, "MacheteLinearKernel"),
        ("w4a16", 32, "h100", 4096, "MarlinLinearKernel"),  # Machete takes groups of 64 and 128
        ("w4a16", 128, "h100", 4096 + 64, "MarlinLinearKernel"),  # and N divisible by 128
        ("w4a16", 128, "a100", 4096, "MarlinLinearKernel"),
        ("w8a8_int8", 128, "cpu", 4096, "CPUInt8ScaledMMLinearKernel"),
        ("nvfp4", 128, "b200", 4096, "CutlassNvFp4LinearKernel"),
    ],
)
def test_which_kernel_runs(name: SchemeName, group: int, device: str, n: int, kernel: str) -> None:
    format_, where = format_of(QuantScheme(name, group_size=group)), CPU if device == "cpu" else gpu(device)
    assert engine_kernel(format_, where, n, 4096) == (kernel, "")


def test_published_gpus() -> None:
    """TFLOP/s without sparsity, TB/s and GiB of the data sheets and nvidia-smi."""
    h100 = gpu("h100")
    assert (h100.rates["bf16"], h100.rates["fp8"], h100.bandwidth) == (989e12, 1979e12, 3.35e12)
    assert h100.memory / 2**30 == pytest.approx(79.65, abs=0.01)
    assert "fp8" not in gpu("a100").rates
    assert "fp4" not in gpu("h200").rates
    for device in GPUS:
        assert device.rates["int8"] == pytest.approx(2 * device.rates["bf16"], rel=0.02)


def test_devices_by_name() -> None:
    assert device_called("h200").bandwidth == 4.8e12
    assert device_called("cpu").memory > 2**30
    with pytest.raises(ConfigError, match="--device: 'tpu' is none of cpu, a100, h100, h200, l40s, b200"):
        device_called("tpu")

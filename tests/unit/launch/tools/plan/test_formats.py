"""The table of formats against the formats themselves and against the engine's sources; why a layer cannot run."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import get_args

import pytest

from launch.tools.plan.devices import CPU, GPUS, Device, device_called
from launch.tools.plan.formats import FORMATS, LEARNER_KERNELS, plan_format
from qarl.errors import ConfigError
from qarl.quant.formats import format_of
from qarl.quant.kernels import low_bit_kernels
from qarl.quant.scheme import QuantScheme, SchemeName

QUANTIZING = [name for name in get_args(SchemeName) if name != "none"]


@pytest.mark.parametrize("name", QUANTIZING)
def test_table_agrees_with_the_formats_that_run(name: SchemeName) -> None:
    planned, real = plan_format(name, 64), format_of(QuantScheme(name, group_size=64))
    assert name in FORMATS
    assert planned.activation_bits == real.activation_bits
    assert (planned.engine_bits or planned.stored_bits) == real.weight_bits
    assert (planned.block[1] or 1) == real.k_multiple
    for where in ("cpu", "cuda"):
        ours = {kernel.name for kernel in planned.kernels if kernel.kind == where}
        assert ours <= set(real.engine_kernels.get(where, ()))
        assert bool(ours) == (where in real.engine_kernels)


def test_every_kernel_of_the_learner_is_known() -> None:
    there = {(name, kind, where) for where in ("cpu", "cuda") for name, kind in low_bit_kernels(where)}
    assert there == LEARNER_KERNELS.keys()
    assert {name for name, _, _ in there} <= set(FORMATS)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs the engine's sources")
def test_kernels_are_the_engines() -> None:
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    executor = Path(spec.origin).parent / "model_executor"
    files = [*executor.glob("kernels/linear/**/*.py"), *executor.glob("layers/quantization/compressed_tensors/**/*.py")]
    sources = "\n".join(file.read_text() for file in files)
    for name in FORMATS:
        format_ = plan_format(name)
        for kernel in (*(kernel.name for kernel in format_.kernels), format_.expert_method):
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
def test_why_a_layer_cannot_run(name: str, device: str, n: int, k: int, fault: str) -> None:
    assert plan_format(name).fault(CPU if device == "cpu" else gpu(device), n, k) == fault


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
def test_which_kernel_runs(name: str, group: int, device: str, n: int, kernel: str) -> None:
    format_, where = plan_format(name, group), CPU if device == "cpu" else gpu(device)
    assert format_.fault(where, n, 4096) == ""
    assert format_.engine_kernel(where, n, 4096) == kernel


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

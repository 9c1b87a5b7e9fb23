"""This machine's rates, by a few seconds of GEMMs: the row of `devices.py` that `qarl plan --measure` uses."""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from launch.tools.plan.devices import Device
from qarl.errors import KernelError
from qarl.numerics.processor import threads
from qarl.quant.formats import FORMATS
from qarl.quant.kernels import choose_kernel
from qarl.quant.scheme import Arithmetic

TOKENS, FEATURES = 256, 4096
"""Shape of a measured GEMM: [TOKENS, FEATURES] by [FEATURES, FEATURES]."""
STREAM_ROWS = 16384
"""Rows of the bfloat16 matrix that is multiplied by a vector for the bandwidth: 128 MiB, beyond the caches."""


def measure(device: Device, seconds: float = 0.5) -> Device:
    """`device` with bandwidth and GEMM rates of this machine, each timed for about `seconds`; one core on CPU.

    The low-bit rates are those of the learner's kernels (`learner.kernel: auto`), activation rounding included.
    Raises KernelError: a kernel cannot run as this process was started.
    """
    where = torch.device(device.kind)
    with threads(1):
        bandwidth, rates = _bandwidth(where, seconds), _rates(where, seconds)
    return replace(
        device,
        bandwidth=bandwidth,
        rates=rates,
        bandwidth_efficiency=1.0,
        gemm_efficiency=1.0,
        source="measured on this machine",
    )


def _bandwidth(where: torch.device, seconds: float) -> float:
    """Bytes/s of a matrix-vector product: what decoding one sequence does."""
    weight_NK = torch.ones(STREAM_ROWS, FEATURES, dtype=torch.bfloat16, device=where)
    x_1K = torch.ones(1, FEATURES, dtype=torch.bfloat16, device=where)
    return weight_NK.nbytes / _best(lambda: torch.nn.functional.linear(x_1K, weight_NK), where, seconds)


def _rates(where: torch.device, seconds: float) -> dict[Arithmetic, float]:
    """FLOP/s of a GEMM by arithmetic, of the first kernel that computes in it."""
    flops = 2.0 * TOKENS * FEATURES**2
    x_MK, weight_NK = torch.randn(TOKENS, FEATURES, device=where), torch.randn(FEATURES, FEATURES, device=where)
    half, x_half = weight_NK.bfloat16(), x_MK.bfloat16()
    rates: dict[Arithmetic, float] = {
        "fp32": flops / _best(lambda: torch.nn.functional.linear(x_MK, weight_NK), where, seconds),
        "bf16": flops / _best(lambda: torch.nn.functional.linear(x_half, half), where, seconds),
    }
    pairs = [(format_, kernel) for format_ in FORMATS.values() for kernel in format_.learner_kernels]
    for format_, low_bit in pairs:
        arithmetic = low_bit.arithmetic
        if low_bit.device != where.type or arithmetic is None or arithmetic in rates:
            continue
        try:
            kernel = choose_kernel(format_, where, torch.bfloat16, low_bit.kind)
        except KernelError:
            continue  # not on this machine: the plan says so of every layer
        prepared = kernel.prepare(format_.quantize(half), None)
        rates[arithmetic] = flops / _best(partial(kernel.forward, x_half, prepared), where, seconds)
    return rates


def _best(run: Callable[[], Tensor], where: torch.device, seconds: float) -> float:
    """Shortest time of one `run` in about `seconds`; on CPU in time of its thread, which a busy machine only blurs."""
    clock = time.perf_counter if where.type == "cuda" else time.thread_time
    run()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        started = clock()
        run()
        if where.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, clock() - started)
    return best

"""The Triton W4A16 kernel without a GPU: its values in Triton's interpreter, its compilation for three generations."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

INTERPRETED = """
import numpy as np, torch, triton.language as tl
from triton.runtime import interpreter

# The interpreter's bfloat16 truncates, and its dot multiplies bit patterns: give it real ones.
convert, dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot

def convert_float(data, source, target, rounding):
    if (source, target) == (tl.float32, tl.bfloat16):
        return torch.from_numpy(np.ascontiguousarray(data)).bfloat16().view(torch.uint16).numpy()
    if (source, target) == (tl.bfloat16, tl.float32):
        return (data.astype(np.uint32) << 16).view(np.float32)
    return convert(data, source, target, rounding)

def create_dot(self, a, b, *rest):
    return dot(self, self.cast_impl(a, tl.float32), self.cast_impl(b, tl.float32), *rest)

interpreter._convert_float, interpreter.InterpreterBuilder.create_dot = convert_float, create_dot

from qarl.quant import int4
from qarl.quant.triton_w4a16 import w4a16_linear

for m, k, n, group, bias in [
    (0, 32, 8, 32, False), (1, 128, 128, 32, False), (7, 256, 72, 32, True), (130, 256, 200, 128, True),
    (3, 192, 33, 64, False), (129, 128, 130, 64, True),
]:
    generator = torch.Generator().manual_seed(m)
    x, weight = (torch.randn(rows, k, generator=generator).bfloat16() for rows in (m, n))
    bias_N = torch.randn(n, generator=generator).bfloat16() if bias else None
    q, scale = int4.quantize_weight(weight, group)
    y = w4a16_linear(x, int4.pack(q), scale, bias_N)
    exact = x.double() @ int4.dequantize(q, scale).bfloat16().double().t()
    if bias_N is not None:
        exact += bias_N.double()
    wrong = int((y != exact.bfloat16()).sum())
    assert y.shape == (m, n) and y.dtype == torch.bfloat16
    assert wrong <= y.numel() * 1e-3, (m, k, n, group, bias, wrong)  # float32 sums near a rounding boundary
    for row in range(min(m, 3)):  # a token's bits do not depend on its batch
        assert torch.equal(w4a16_linear(x[row : row + 1], int4.pack(q), scale, bias_N)[0], y[row])
"""

COMPILED = """
import sys, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from qarl.quant import triton_w4a16 as kernel

constants = {"K": 4096, "GROUP": 128, "HAS_BIAS": True}
constants |= {name: getattr(kernel, name) for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K")}
types = dict(x_ptr="*bf16", packed_ptr="*i32", scale_ptr="*bf16", bias_ptr="*bf16", y_ptr="*bf16", tokens="i32")
names = kernel._gemm.arg_names
signature = types | {"outputs": "i32"} | {name: "constexpr" for name in constants}
source = ASTSource(kernel._gemm, signature, {(names.index(name),): value for name, value in constants.items()})
options = {"num_warps": kernel.WARPS, "num_stages": kernel.STAGES}
for capability, instruction in zip(sys.argv[1::2], sys.argv[2::2]):
    found = triton.compile(source, GPUTarget("cuda", int(capability), 32), options)
    assert instruction in found.asm["ptx"], capability
    assert found.metadata.shared <= 99 * 1024, capability  # bytes, what every one of them has
"""


def run(code: str, *args: str, **env: str) -> None:
    """Triton decides at its import whether it interprets: a process of its own."""
    command = [sys.executable, "-c", code, *args]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env={**os.environ, **env})
    assert done.returncode == 0, done.stderr[-2000:]


def test_values_in_the_interpreter() -> None:
    run(INTERPRETED, TRITON_INTERPRET="1")


def test_it_compiles_for_the_tensor_cores_of_each_generation(tmp_path: Path) -> None:
    ampere, hopper, blackwell = ("80", "mma.sync"), ("90", "wgmma.mma_async"), ("100", "tcgen05.mma")
    run(COMPILED, *ampere, *hopper, *blackwell, TRITON_CACHE_DIR=str(tmp_path))

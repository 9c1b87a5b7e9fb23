"""`qarl bench kernels`: every low-bit linear that a learner has on CUDA, beside the bfloat16 linear, in one run."""

import time
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from launch.tools.bench.compare import HEADER, Case, compare
from qarl.errors import KernelError, ResourceError
from qarl.quant.kernels import low_bit_kernels
from qarl.quant.linear import align_linears
from qarl.quant.scheme import QuantScheme

PLAIN = "bfloat16"
CALLS = 20  # of a layer, in one timed run: a single one would be over before the clock can tell


def bench(hidden: Sequence[int], tokens: Sequence[int], rounds: int) -> Iterator[str]:
    """The lines of the report, as soon as each is known. Raises ResourceError where there is no CUDA device."""
    if not torch.cuda.is_available():
        raise ResourceError("no CUDA device on this machine", hint="run it where there is one")
    yield f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}, {rounds} rounds"
    yield from bench_on(torch.device("cuda"), hidden, tokens, rounds)


def bench_on(device: torch.device, hidden: Sequence[int], tokens: Sequence[int], rounds: int) -> Iterator[str]:
    """A table of forwards, by layer ([hidden, hidden] and [3 hidden, hidden]), tokens and kernel."""
    clock = _cuda_clock if device.type == "cuda" else time.process_time
    torch.manual_seed(0)
    yield f"\n{HEADER}"
    for width in hidden:
        for outputs in (width, 3 * width):
            plain = nn.Linear(width, outputs, bias=False, device=device, dtype=torch.bfloat16)
            layers, missing = _aligned(plain)
            yield from missing
            for count in tokens:
                x_MK = torch.randn(count, width, device=device, dtype=torch.bfloat16)
                runs = {name: partial(_calls, layer, x_MK) for name, layer in ({PLAIN: plain} | layers).items()}
                yield from compare(Case(f"{count} tokens, {width} to {outputs}", runs, calls=CALLS), rounds, clock)


def _aligned(plain: nn.Linear) -> tuple[dict[str, nn.Module], list[str]]:
    """The layer in every low-bit format that has a kernel on its device; a table row for each that cannot run here."""
    layers: dict[str, nn.Module] = {}
    missing = []
    for name, kind in low_bit_kernels(plain.weight.device.type):
        model = nn.Sequential(plain)
        try:
            align_linears(model, QuantScheme(name, ()), kind)
            _calls(model, plain.weight.new_zeros(1, plain.in_features))
        except KernelError as error:
            missing.append(f"| {name}, {kind}: {error} | | | | |")
        else:
            layers[f"{name}, {kind}"] = model
    return layers, missing


@torch.no_grad()
def _calls(layer: nn.Module, x_MK: Tensor) -> None:
    for _ in range(CALLS):
        layer(x_MK)


def _cuda_clock() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()

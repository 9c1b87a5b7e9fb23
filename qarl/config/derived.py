"""What follows from a config and the device that it runs on."""

from __future__ import annotations

from qarl.config.run import Config
from qarl.quant.scheme import KernelKind
from qarl.types import Numerics


def numerics_of(config: Config, device: str) -> Numerics:
    """The numerics profile of a run on `device`; the naive baseline is plain transformers."""
    if not config.learner.aligned:
        return "stock"
    if config.learner.numerics == "auto":
        return "engine" if device == "cpu" else "portable"
    return config.learner.numerics


def kernel_of(config: Config, numerics: Numerics, device: str) -> KernelKind:
    """The kind of low-bit GEMM that a run asks for on `device` under `numerics`."""
    kind = config.learner.kernel
    portable = numerics == "portable" and device == "cpu"  # no engine op there to leave out on GPU
    return "torch" if kind == "auto" and portable else kind

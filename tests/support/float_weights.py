"""Weights of every kind that a grid may meet."""

from __future__ import annotations

import torch
from torch import Tensor

KINDS = ("random", "zero", "extreme", "subnormal", "tiny", "huge")
EXTREMES = [0.0, -0.0, 1e-45, -1e-40, 2.0**-126, 1e-30, 0.5, -1.0, 3.0, 2.9e38, -2.9e38]
SIZES = {"random": 1.0, "subnormal": 1e-39, "tiny": 1e-36, "huge": 1e38}


def float_weight(seed: int, kind: str, shape: tuple[int, int]) -> Tensor:
    """float32, below 2.98e38; one row is zero, one -0.0."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "zero":
        return torch.zeros(shape)
    if kind == "extreme":
        return torch.tensor(EXTREMES)[torch.randint(len(EXTREMES), shape, generator=generator)]
    weight = (torch.randn(shape, generator=generator) * SIZES[kind]).clamp(-2.9e38, 2.9e38)
    weight[0], weight[1] = 0.0, -0.0
    return weight


def as_bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)

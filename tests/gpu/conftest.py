"""Tests for a CUDA machine: `pytest -m gpu tests/gpu`. They need no vLLM, Ray, DeepSpeed or W&B."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def cuda() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device("cuda")

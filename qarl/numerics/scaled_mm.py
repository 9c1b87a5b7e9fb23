"""How engine and learner call torch's GEMM of fp8 values on CPU. Suffixes: M tokens, K input features."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

FEWEST_ROWS = 4  # of a GEMM


@contextmanager
def without_onednn() -> Iterator[None]:
    """torch's own GEMM in place of oneDNN's.

    On hosts with AMX torch hands `_scaled_mm` of fp8 to oneDNN, which knows it for AMX-FP8 only: limited to AVX-512 it
    falls to its scalar reference, hundreds of times slower, and otherwise fails.
    """
    enabled = torch.backends.mkldnn.set_flags(_enabled=False, _fp32_precision=None)[0]
    try:
        yield
    finally:
        torch.backends.mkldnn.set_flags(_enabled=enabled, _fp32_precision=None)


def enough_rows(q_x_MK: Tensor) -> Tensor:
    """With zero rows up to a fewest number.

    MKL's AVX2 kernels, which it takes on AMD's processors, too, sum one to three rows in an order of their own, and a
    token would not have one value in any batch.
    """
    if len(q_x_MK) >= FEWEST_ROWS:
        return q_x_MK
    return torch.cat((q_x_MK, q_x_MK.new_zeros(FEWEST_ROWS - len(q_x_MK), q_x_MK.shape[1])))

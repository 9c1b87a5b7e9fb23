"""What an evaluation estimates, and how sure it is.

Suffixes: P prompts, R resamples, N samples of a prompt, K chosen ones, C answers.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
RESAMPLES = 10_000
CHOICES = 200
"""Random choices of k samples over which a vote is averaged."""
CHUNK = 2**22
"""Resampled values that exist at a time."""


class Estimate(NamedTuple):
    """A mean over prompts with its 95% interval."""

    value: float
    low: float
    high: float


class Difference(NamedTuple):
    """Mean of the differences of pairs with its 95% interval, and the p-value of there being none."""

    value: float
    low: float
    high: float
    p: float


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k samples is right (Chen et al., arXiv 2107.03374).

        1 - C(n - c, k) / C(n, k)        n samples, c of them right

    Raises ValueError: k is not between 1 and n.
    """
    if not 1 <= k <= samples:
        raise ValueError(f"pass@{k} of {samples} samples")
    if samples - right < k:
        return 1.0
    return 1.0 - float(np.prod(1.0 - k / np.arange(samples - right + 1, samples + 1)))


def majority_at_k(answers: Sequence[str], right: Sequence[bool], k: int, seed: int = 0) -> float:
    """The chance that the most frequent answer of k of the samples is right; of equally frequent ones one is drawn.

    All right samples have one answer, however it is written; a sample without an answer ("") does not vote.
    """
    votes = ["right" if is_right else f"wrong {answer}" for answer, is_right in zip(answers, right, strict=True)]
    names = ["right", *sorted({vote for vote in votes if vote not in ("right", "wrong ")})]
    is_for_NC = np.array([[vote == name for name in names] for vote in votes], np.int64)
    rng = np.random.default_rng(seed)
    chosen_RK = [rng.permutation(len(votes))[:k] for _ in range(CHOICES if k < len(votes) else 1)]
    counts_RC = is_for_NC[np.array(chosen_RK)].sum(1)
    is_first_RC = counts_RC == np.maximum(counts_RC.max(1, keepdims=True), 1)
    return float((is_first_RC[:, 0] / np.maximum(is_first_RC.sum(1), 1)).mean())


def estimate(values_P: Floats, seed: int = 0) -> Estimate:
    """The mean, with the percentile bootstrap over prompts: samples of one prompt are not independent.

    Too narrow below some ten prompts; of width 0 where all values are equal.
    """
    low, high = np.percentile(_resampled_means(values_P, seed), [2.5, 97.5])
    return Estimate(float(values_P.mean()), float(low), float(high))


def compare(a_P: Floats, b_P: Floats, seed: int = 0) -> Difference:
    """b - a of the same prompts: bootstrap interval, and a two-sided test that flips the signs of the differences."""
    d_P = b_P - a_P
    mean, low, high = estimate(d_P, seed)
    signs = np.random.default_rng(seed)
    rows = max(1, CHUNK // len(d_P))
    extreme = 0
    for start in range(0, RESAMPLES, rows):
        flips_RP = signs.choice((-1.0, 1.0), (min(rows, RESAMPLES - start), len(d_P)))
        extreme += int((np.abs((flips_RP * d_P).mean(1)) >= abs(mean) - 1e-12).sum())
    return Difference(mean, low, high, (extreme + 1) / (RESAMPLES + 1))


def _resampled_means(values_P: Floats, seed: int) -> Floats:
    rng, rows = np.random.default_rng(seed), max(1, CHUNK // len(values_P))
    parts = []
    for start in range(0, RESAMPLES, rows):
        drawn_RP = rng.integers(len(values_P), size=(min(rows, RESAMPLES - start), len(values_P)))
        parts.append(values_P[drawn_RP].mean(1))
    return np.concatenate(parts)

"""How far the learner's policy is from the one that sampled. Suffixes: N tokens of all sequences, S sequences."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

Logprobs = npt.NDArray[np.float32]

QUARTILES = 4


@dataclass(frozen=True)
class Mismatch:
    """d_t = log pi_learner - log pi_sampler of the sampled tokens (nats), in float64.

    k1 = mean(-d) and k3 = mean(exp(d) - 1 - d) estimate KL(sampler || learner)
    (http://joschu.net/blog/kl-approx.html).
    """

    abs_mean: float
    abs_p99: float
    abs_max: float
    k1: float
    k3: float
    seq_ratio_min: float
    """Of the length-normalised sequence ratios exp(mean_t d_t) (GSPO, arXiv 2507.18071)."""
    seq_ratio_mean: float
    seq_ratio_max: float
    ess: float
    """Effective sample size over the number of sequences: (sum_s w_s)^2 / (S sum_s w_s^2) of the plain importance
    weights w_s = exp(sum_t d_t) (Kong 1992); 1 when all weights are equal, 1/S when one has everything."""
    above: Mapping[float, float]
    """Bound -> share of tokens with |d| above it."""

    @classmethod
    def between(
        cls, learner: Sequence[Logprobs], sampler: Sequence[Logprobs], token_bounds: Sequence[float] = ()
    ) -> Self:
        """Over all tokens of matching sequences; sequences without a token do not count.

        Raises ValueError when lengths differ, or no token is given.
        """
        if [len(a) for a in learner] != [len(b) for b in sampler]:
            raise ValueError("learner and sampler log-probs have different lengths")
        if not sum(map(len, learner)):
            raise ValueError("no token to compare")
        d_N = np.concatenate(learner).astype(np.float64) - np.concatenate(sampler).astype(np.float64)
        size_N = np.abs(d_N)
        lengths_S = np.array([len(a) for a in learner if len(a)])
        log_w_S = np.add.reduceat(d_N, np.cumsum(lengths_S) - lengths_S)
        ratio_S = np.exp(log_w_S / lengths_S)
        return cls(
            abs_mean=float(size_N.mean()),
            abs_p99=float(np.quantile(size_N, 0.99)),
            abs_max=float(size_N.max()),
            k1=float(-d_N.mean()),
            k3=float(np.mean(np.expm1(d_N) - d_N)),
            seq_ratio_min=float(ratio_S.min()),
            seq_ratio_mean=float(ratio_S.mean()),
            seq_ratio_max=float(ratio_S.max()),
            ess=_effective_share(log_w_S),
            above={bound: float(np.mean(size_N > bound)) for bound in token_bounds},
        )

    def metrics(self, prefix: str = "mismatch/") -> dict[str, float]:
        return {
            f"{prefix}logp_abs_mean": self.abs_mean,
            f"{prefix}logp_abs_p99": self.abs_p99,
            f"{prefix}logp_abs_max": self.abs_max,
            f"{prefix}k1_kl": self.k1,
            f"{prefix}k3_kl": self.k3,
            f"{prefix}seq_ratio_min": self.seq_ratio_min,
            f"{prefix}seq_ratio_mean": self.seq_ratio_mean,
            f"{prefix}seq_ratio_max": self.seq_ratio_max,
            f"{prefix}ess": self.ess,
            **{f"{prefix}logp_abs_above_{bound:g}": share for bound, share in self.above.items()},
        }


def quartiles(sequences: Sequence[Logprobs]) -> list[list[Logprobs]]:
    """Each sequence cut into four runs of nearly equal length: first quarters first. Short ones leave some empty."""
    return [[a[len(a) * q // QUARTILES : len(a) * (q + 1) // QUARTILES] for a in sequences] for q in range(QUARTILES)]


def by_quartile(
    learner: Sequence[Logprobs], sampler: Sequence[Logprobs], token_bounds: Sequence[float] = ()
) -> dict[int, Mismatch]:
    """The mismatch of each quarter (1 to 4) of the responses; a quarter in which no response has a token is left out.

    Each quarter counts as a response of its own: the sequence ratios and the effective sample size are those of the
    quarters. Raises ValueError when lengths differ.
    """
    parts = zip(quartiles(learner), quartiles(sampler), strict=True)
    return {
        number: Mismatch.between(ours, theirs, token_bounds)
        for number, (ours, theirs) in enumerate(parts, 1)
        if any(map(len, (*ours, *theirs)))
    }


def _effective_share(log_w_S: npt.NDArray[np.float64]) -> float:
    w_S = np.exp(log_w_S - log_w_S.max())  # a common factor cancels, and none overflows
    return float(w_S.sum() ** 2 / (len(w_S) * np.sum(w_S**2)))

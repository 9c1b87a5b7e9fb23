"""How far the learner's policy is from the one that sampled. Suffixes: N tokens of all sequences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Logprobs = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Mismatch:
    """d = log pi_learner - log pi_sampler over sampled tokens (nats); k1 and k3 estimate KL(sampler || learner).

    k1 = mean(-d), k3 = mean(exp(d) - 1 - d) (http://joschu.net/blog/kl-approx.html).
    """

    abs_mean: float
    abs_p99: float
    abs_max: float
    k1: float
    k3: float

    @classmethod
    def between(cls, learner: Sequence[Logprobs], sampler: Sequence[Logprobs]) -> Mismatch:
        """Over all tokens of matching sequences. Raises ValueError when lengths differ, or no token is given."""
        if [len(a) for a in learner] != [len(b) for b in sampler]:
            raise ValueError("learner and sampler log-probs have different lengths")
        if not sum(map(len, learner)):
            raise ValueError("no token to compare")
        d_N = np.concatenate(learner).astype(np.float64) - np.concatenate(sampler).astype(np.float64)
        size_N = np.abs(d_N)
        k3 = np.mean(np.expm1(d_N) - d_N)
        return cls(
            float(size_N.mean()), float(np.quantile(size_N, 0.99)), float(size_N.max()), float(-d_N.mean()), float(k3)
        )

    def metrics(self, prefix: str = "mismatch/") -> dict[str, float]:
        return {
            f"{prefix}logp_abs_mean": self.abs_mean,
            f"{prefix}logp_abs_p99": self.abs_p99,
            f"{prefix}logp_abs_max": self.abs_max,
            f"{prefix}k1_kl": self.k1,
            f"{prefix}k3_kl": self.k3,
        }

"""Error tokens: what low-bit sampling leaves in long responses, found by three detectors.

QaRL (arXiv 2604.07853) finds them repetitive and garbled, improbable under the learner, in clusters, and mostly in
responses of negative advantage. It gives no detector; these are the field's usual ones, each with its own threshold.
"""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qarl.config.error_tokens import ErrorTokensConfig

Flags = npt.NDArray[np.bool_]
QUARTILES = 4


@dataclass(frozen=True)
class ErrorTokens:
    """Which tokens of one response each detector flags."""

    repeated_T: Flags
    compressible_T: Flags
    improbable_T: Flags

    @property
    def any_T(self) -> Flags:
        return self.repeated_T | self.compressible_T | self.improbable_T

    @property
    def share(self) -> float:
        """Of an empty response 0."""
        return float(self.any_T.mean()) if len(self.any_T) else 0.0

    def columns(self) -> dict[str, float | str]:
        """For a table: the share, and which tokens (from 0) each detector flags: "repeated 3-9 improbable 12-14"."""
        texts = [
            " ".join([name, *(f"{start}-{end - 1}" for start, end in spans(flags(self)))])
            for name, flags in DETECTORS.items()
            if flags(self).any()
        ]
        return {"error_share": self.share, "error_tokens": " ".join(texts)}


DETECTORS: dict[str, Callable[[ErrorTokens], Flags]] = {
    "repeated": lambda e: e.repeated_T,
    "compressible": lambda e: e.compressible_T,
    "improbable": lambda e: e.improbable_T,
}


def find_error_tokens(
    ids: Sequence[int], text: str, logp_T: npt.NDArray[np.float32], config: ErrorTokensConfig
) -> ErrorTokens:
    """Run the detectors on one response: its tokens, its text, and their log-probs (nats) under the learner."""
    garbled = compression_ratio(text) > config.compression_ratio
    return ErrorTokens(
        repeated_ngrams(np.asarray(ids), config.ngram, config.ngram_count),
        np.full(len(ids), garbled),
        runs(np.exp(logp_T) < config.probability, config.probability_run),
    )


def repeated_ngrams(ids_T: npt.NDArray[np.int64], n: int, count: int) -> Flags:
    """Tokens that lie in an n-gram which occurs at least `count` times; occurrences may overlap."""
    flags_T = np.zeros(len(ids_T), bool)
    if len(ids_T) < n:
        return flags_T
    grams = np.lib.stride_tricks.sliding_window_view(ids_T, n)
    _, inverse, counts = np.unique(grams, axis=0, return_inverse=True, return_counts=True)
    frequent = counts[inverse.ravel()] >= count
    for offset in range(n):
        flags_T[offset : offset + len(frequent)] |= frequent
    return flags_T


def compression_ratio(text: str) -> float:
    """Bytes of the text over bytes of its zlib compression; 0 for an empty text."""
    data = text.encode()
    return len(data) / len(zlib.compress(data))


def spans(flags_T: Flags) -> list[tuple[int, int]]:
    """Start and end (one past the last) of every run of flags."""
    edges = np.diff(np.concatenate([[False], flags_T, [False]]).astype(np.int8))
    return list(zip(np.flatnonzero(edges == 1).tolist(), np.flatnonzero(edges == -1).tolist(), strict=True))


def runs(flags_T: Flags, least: int) -> Flags:
    """The flags that stand in runs of at least `least`."""
    kept_T = np.zeros(len(flags_T), bool)
    for start, end in spans(flags_T):
        kept_T[start:end] = end - start >= least
    return kept_T


def error_token_metrics(found: Sequence[ErrorTokens], advantages: Sequence[float]) -> dict[str, float]:
    """Shares of tokens: of all, by detector, by quartile of the position in the response, by sign of the advantage.

    `error_tokens/responses` is the share of responses that hold any. What nothing falls under is left out.
    """
    parts = {name: [flags(e) for e in found] for name, flags in DETECTORS.items()}
    parts["share"] = [e.any_T for e in found]
    for q in range(QUARTILES):
        parts[f"q{q + 1}"] = [_quarter(e.any_T, q) for e in found]
    signs = {"positive": 1.0, "zero": 0.0, "negative": -1.0}
    for name, sign in signs.items():
        parts[name] = [e.any_T for e, advantage in zip(found, advantages, strict=True) if np.sign(advantage) == sign]
    joined = {name: np.concatenate(flags) for name, flags in parts.items() if flags}
    metrics = {f"error_tokens/{name}": float(flags.mean()) for name, flags in joined.items() if len(flags)}
    if found:
        metrics["error_tokens/responses"] = float(np.mean([e.any_T.any() for e in found]))
    return metrics


def worst(found: Sequence[ErrorTokens], rows: int) -> list[int]:
    """Indices of the responses of largest share, those without error tokens left out."""
    order = sorted(range(len(found)), key=lambda i: found[i].share, reverse=True)
    return [i for i in order if found[i].share > 0][:rows]


def _quarter(flags_T: Flags, number: int) -> Flags:
    """The first (0) to last (3) quarter of the tokens; of fewer than four tokens some are empty."""
    return flags_T[len(flags_T) * number // QUARTILES : len(flags_T) * (number + 1) // QUARTILES]

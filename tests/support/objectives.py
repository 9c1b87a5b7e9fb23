"""Every objective again, term by term in Python floats, from its equation."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from qarl.metrics import Histogram, Metrics, merge
from qarl.objectives.ratios import LossInputs
from qarl.objectives.registry import compute_loss


@dataclass(frozen=True)
class Batch:
    """Log-probs, mask and advantages, from which rows can be picked."""

    theta_BT: Tensor
    prox_BT: Tensor
    samp_BT: Tensor
    mask_BT: Tensor
    advantage_B: Tensor

    def pick(self, rows: Any) -> Batch:
        index = torch.tensor(list(rows))
        return Batch(*(t[index] for t in (self.theta_BT, self.prox_BT, self.samp_BT, self.mask_BT, self.advantage_B)))

    def inputs(self, whole: Batch | None = None) -> LossInputs:
        """As part of the minibatch `whole`."""
        whole = whole or self
        fields = (self.theta_BT, self.prox_BT, self.samp_BT, self.mask_BT, self.advantage_B)
        return LossInputs(*fields, len(whole.mask_BT), int(whole.mask_BT.sum()))

    def run(self, config: Any, whole: Batch | None = None) -> tuple[Tensor, Tensor, dict[str, float]]:
        """Loss, its gradient [B, T], and reduced metrics."""
        loss, grad_BT, metrics = self.run_part(config, whole)
        return loss, grad_BT, numbers([metrics])

    def run_part(self, config: Any, whole: Batch | None = None) -> tuple[Tensor, Tensor, Metrics]:
        """The same with partial metrics."""
        theta_BT = self.theta_BT.clone().requires_grad_()
        loss, metrics = compute_loss(replace(self, theta_BT=theta_BT).inputs(whole), config)
        (grad_BT,) = torch.autograd.grad(loss, theta_BT)
        return loss.detach(), grad_BT, metrics


def numbers(parts: Sequence[Metrics]) -> dict[str, float]:
    """Reduced metrics; a histogram is one number a bin."""
    reduced = merge(parts)
    plain = {name: value for name, value in reduced.items() if not isinstance(value, Histogram)}
    histograms = {name: value for name, value in reduced.items() if isinstance(value, Histogram)}
    return plain | {f"{name}/{i}": float(n) for name, value in histograms.items() for i, n in enumerate(value.counts)}


def random_batch(
    seed: int, sequences: int, tokens: int, drift: float, full: bool = False, dtype: torch.dtype = torch.float64
) -> Batch:
    """Random log-probs; `drift` is the spread of the policies' log-ratios; `full` leaves nothing masked."""
    generator = torch.Generator().manual_seed(seed)
    shape = (sequences, tokens)

    def noise() -> Tensor:
        return drift * torch.randn(shape, generator=generator, dtype=dtype)

    prox_BT = -3 * torch.rand(shape, generator=generator, dtype=dtype)
    lengths_B1 = torch.randint(tokens if full else 1, tokens + 1, (sequences, 1), generator=generator)
    advantage_B = torch.randn(sequences, generator=generator, dtype=dtype)
    return Batch(prox_BT + noise(), prox_BT, prox_BT + noise(), torch.arange(tokens) < lengths_B1, advantage_B)


BATCHES = st.builds(
    random_batch,
    seed=st.integers(0, 10**6),
    sequences=st.integers(1, 5),
    tokens=st.integers(1, 6),
    drift=st.sampled_from([1e-3, 0.1, 1.0]),
)
FULL_BATCHES = st.builds(
    random_batch,
    seed=st.integers(0, 10**6),
    sequences=st.integers(1, 5),
    tokens=st.integers(1, 6),
    drift=st.sampled_from([0.1, 1.0]),
    full=st.just(True),
)


def clip(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)


def weights(config: Any, w_T: list[float], w_seq: float) -> list[float]:
    """The mismatch weight of each token."""
    match config.kind:
        case "none":
            return [1.0] * len(w_T)
        case "token_tis" | "adaptive_clip":
            return [min(w, config.cap) for w in w_T]
        case "sequence_tis":
            return [min(w_seq, config.cap)] * len(w_T)
        case "token_mask":
            return [w if config.low <= w <= config.high else 0.0 for w in w_T]
        case "sequence_mask":
            return [w_seq if config.low <= w_seq <= config.high else 0.0] * len(w_T)
        case "sequence_reject":
            return [1.0 if config.low <= w_seq <= config.high else 0.0] * len(w_T)
    raise AssertionError(config.kind)


def ppo(r: float, a: float, low: float, high: float) -> float:
    return min(r * a, clip(r, 1 - low, 1 + high) * a)


def token_ppo(c: Any, r: float, a: float, w: float) -> float:
    """Dual-clip PPO, arXiv 1912.09729, equation 5: max(min(...), c A) for A < 0. QuRL's bound is (1 + eps) / r, where r
    is the share of w that truncation leaves."""
    left = min(w, c.correction.cap) / w if c.correction.kind == "adaptive_clip" else 1.0
    term = ppo(r, a, c.clip_ratio_low, (1 + c.clip_ratio_high) / left - 1)
    return max(term, c.clip_ratio_c * a) if c.clip_ratio_c and a < 0 else term


def band(c: Any, r: float, a: float) -> float:
    if a >= 0:
        return ppo(r, a, c.seq_clip_ratio_low, c.seq_clip_ratio_high)
    if c.positive_only:
        return 0.0
    if c.dual_clip:
        return clip(r, 1 - c.neg_seq_clip_ratio_low, 1 + c.neg_seq_clip_ratio_high) * a
    return ppo(r, a, c.neg_seq_clip_ratio_low, c.seq_clip_ratio_high)


def reference_loss(theta: list[list[float]], batch: Batch, c: Any) -> tuple[float, list[float]]:
    """The loss, and every ratio r_t, r_seq, w_t, w_seq that a bound may apply to."""
    total, lengths, seen = 0.0, [], []
    cap = correction_of(c)
    for b, a in enumerate(batch.advantage_B.tolist()):
        kept = [t for t, real in enumerate(batch.mask_BT[b].tolist()) if real]
        prox, samp = batch.prox_BT[b].tolist(), batch.samp_BT[b].tolist()
        n = len(kept)
        r_T = [math.exp(theta[b][t] - prox[t]) for t in kept]
        w_T = [math.exp(prox[t] - samp[t]) for t in kept]
        r_seq, w_seq = math.prod(r_T) ** (1 / n), math.prod(w_T) ** (1 / n)
        u_T = weights(cap, w_T, w_seq)
        logp_T = [theta[b][t] for t in kept]
        match c.kind:
            case "tbpo" if c.level == "sequence":
                terms = [u * band(c, r_seq, a) for u in u_T]
            case "tbpo":
                terms = [u * band(c, r, a) for u, r in zip(u_T, r_T, strict=True)]
            case "gspo":
                terms = [u * ppo(r_seq, a, c.seq_clip_ratio_low, c.seq_clip_ratio_high) for u in u_T]
            case "grpo" | "dr_grpo" | "dapo" | "reinforce_pp":
                terms = [u * token_ppo(c, r, a, w) for u, r, w in zip(u_T, r_T, w_T, strict=True)]
            case "gbpo":
                target = 1 + c.clip_ratio_high if a >= 0 else 1 - c.clip_ratio_low
                terms = [-u * abs(a) * abs(r - target) for u, r in zip(u_T, r_T, strict=True)]
            case "cispo":
                clipped = [clip(r, 1 - c.is_clip_low, 1 + c.is_clip_high) for r in detached(batch, b)]
                terms = [u * k * a * logp for u, k, logp in zip(u_T, clipped, logp_T, strict=True)]
            case "on_policy" | "rloo":
                terms = [u * a * logp for u, logp in zip(u_T, logp_T, strict=True)]
        total += sum(terms) * scale(c, n)
        lengths.append(n)
        seen += [*r_T, *w_T, r_seq, w_seq]
        seen += [r * min(w, cap.cap) / w for r, w in zip(r_T, w_T, strict=True) if cap.kind == "adaptive_clip"]
    return -total / (sum(lengths) if token_mean(c) else len(lengths)), seen


def detached(batch: Batch, b: int) -> list[float]:
    """r_t of the unperturbed policy: what a stop-gradient holds fixed under finite differences."""
    mask_T = batch.mask_BT[b]
    return [math.exp(x) for x in (batch.theta_BT[b, mask_T].double() - batch.prox_BT[b, mask_T].double()).tolist()]


def scale(c: Any, length: int) -> float:
    if c.kind == "dr_grpo":
        return 1 / c.normalizer
    return 1.0 if token_mean(c) or c.kind == "rloo" else 1 / length


def token_mean(c: Any) -> bool:
    return c.kind in {"dapo", "cispo", "reinforce_pp"} or getattr(c, "aggregation", "") == "token_mean"


@dataclass(frozen=True)
class SimpleCap:
    cap: float
    kind: str = "sequence_tis"


def correction_of(c: Any) -> Any:
    return SimpleCap(c.seq_tis_imp_ratio_cap) if c.kind == "tbpo" and c.correction is None else c.correction


def gradient_bound(c: Any, batch: Batch) -> Tensor:
    """The largest gradient that a token of each sequence can have, [B, 1]: |A|, times the largest weight, times the
    largest ratio that keeps a gradient (the gradient of a ratio is the ratio, that of log pi is 1), times the share of
    one term in the loss. `c` bounds both: a dual clip, or no gradient through a ratio; not `adaptive_clip`."""
    correction = correction_of(c)
    match correction.kind:
        case "none" | "sequence_reject":
            weight = 1.0
        case "token_mask" | "sequence_mask":
            weight = correction.high
        case _:
            weight = correction.cap
    match c.kind:
        case "tbpo":
            ratio = 1 + max(c.seq_clip_ratio_high, c.neg_seq_clip_ratio_high)
        case "grpo":
            ratio = max(1 + c.clip_ratio_high, c.clip_ratio_c)
        case "cispo":
            ratio = 1 + c.is_clip_high
        case "on_policy" | "rloo":
            ratio = 1.0
    lengths = batch.mask_BT.sum(1).tolist()
    size = sum(lengths) if token_mean(c) else len(lengths)
    share_B = batch.advantage_B.new_tensor([scale(c, length) / size for length in lengths])
    return (weight * ratio * share_B * batch.advantage_B.abs())[:, None]


def numeric_gradient(loss: Callable[[list[list[float]]], float], at_BT: Tensor, h: float = 1e-6) -> Tensor:
    """Central differences of `loss` at `at_BT`."""
    rows = at_BT.double().tolist()
    grad_BT = torch.zeros(at_BT.shape, dtype=torch.float64)
    for b, row in enumerate(rows):
        for t, value in enumerate(row):
            row[t] = value + h
            above = loss(rows)
            row[t] = value - h
            grad_BT[b, t] = (above - loss(rows)) / (2 * h)
            row[t] = value
    return grad_BT


def bounds(c: Any) -> list[float]:
    """Every bound that the config puts on a ratio."""
    found: list[float] = []
    for name, value in c.model_dump().items():
        if isinstance(value, dict):
            found += [v for k, v in value.items() if k in {"cap", "low", "high"}]
        elif isinstance(value, float):
            found += [1 - value, 1 + value, value] if "ratio" in name or "clip" in name else []
    return found

"""TBPO against its equation, written out in Python floats. Suffixes: B sequences, T response tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from qarl.metrics import Metrics
from qarl.objectives.config import TBPOConfig
from qarl.objectives.ratios import LossInputs, Ratios
from qarl.objectives.tbpo import tbpo
from tests.unit.objectives.reference import numbers

PUBLISHED = TBPOConfig()
WIDE = TBPOConfig(
    seq_clip_ratio_low=0.1,
    seq_clip_ratio_high=0.2,
    neg_seq_clip_ratio_low=0.15,
    neg_seq_clip_ratio_high=0.3,
    seq_tis_imp_ratio_cap=1.1,
)


@dataclass(frozen=True)
class Batch:
    theta_BT: Tensor
    prox_BT: Tensor
    samp_BT: Tensor
    mask_BT: Tensor
    advantage_B: Tensor

    def pick(self, rows: Sequence[int]) -> Batch:
        index = torch.tensor(rows)
        return Batch(*(t[index] for t in (self.theta_BT, self.prox_BT, self.samp_BT, self.mask_BT, self.advantage_B)))

    def inputs(self, num_sequences: int | None = None) -> LossInputs:
        fields = (self.theta_BT, self.prox_BT, self.samp_BT, self.mask_BT, self.advantage_B)
        return LossInputs(*fields, num_sequences or len(self.advantage_B), num_tokens=10**6)

    def run(self, config: TBPOConfig, num_sequences: int | None = None) -> tuple[Tensor, Tensor, dict[str, float]]:
        """Loss, its gradient [B, T], and reduced metrics."""
        theta_BT = self.theta_BT.clone().requires_grad_()
        loss, metrics = tbpo(replace(self, theta_BT=theta_BT).inputs(num_sequences), config)
        (grad_BT,) = torch.autograd.grad(loss, theta_BT)
        return loss.detach(), grad_BT, numbers([metrics])


def random_batch(seed: int, sequences: int, tokens: int, drift: float) -> Batch:
    """Random log-probs; `drift` is the spread of the three policies' log-ratios."""
    generator = torch.manual_seed(seed)
    shape = (sequences, tokens)
    prox_BT = -3 * torch.rand(shape, generator=generator)
    lengths_B = torch.randint(1, tokens + 1, (sequences, 1), generator=generator)
    return Batch(
        prox_BT + drift * torch.randn(shape, generator=generator),
        prox_BT,
        prox_BT + drift * torch.randn(shape, generator=generator),
        torch.arange(tokens) < lengths_B,
        torch.randn(sequences, generator=generator),
    )


BATCHES = st.builds(
    random_batch,
    seed=st.integers(0, 10**6),
    sequences=st.integers(1, 5),
    tokens=st.integers(1, 6),
    drift=st.sampled_from([1e-3, 0.1, 1.0]),
)
CONFIGS = st.sampled_from([PUBLISHED, WIDE])


def one(advantage: float, ratio: float, weight: float = 1.0, tokens: int = 4) -> Batch:
    """One sequence with the given sequence ratio and mismatch weight."""
    prox_BT = torch.linspace(-2, -1, tokens)[None]
    mask_BT = torch.ones(1, tokens, dtype=torch.bool)
    samp_BT = prox_BT - math.log(weight)
    return Batch(prox_BT + math.log(ratio), prox_BT, samp_BT, mask_BT, torch.tensor([advantage]))


def stack(*batches: Batch) -> Batch:
    fields = ("theta_BT", "prox_BT", "samp_BT", "mask_BT", "advantage_B")
    return Batch(*(torch.cat([getattr(batch, name) for batch in batches]) for name in fields))


def clip(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)


def equation(theta_BT: list[list[float]], batch: Batch, c: TBPOConfig) -> tuple[float, list[float]]:
    """The loss by the paper's equation, and the ratio of each sequence."""
    total, ratios = 0.0, []
    for b, advantage in enumerate(batch.advantage_B.tolist()):
        kept = [t for t, real in enumerate(batch.mask_BT[b].tolist()) if real]
        prox, samp = batch.prox_BT[b].tolist(), batch.samp_BT[b].tolist()
        r = math.exp(sum(theta_BT[b][t] - prox[t] for t in kept) / len(kept))
        w = math.exp(sum(prox[t] - samp[t] for t in kept) / len(kept))
        if advantage >= 0:
            s = min(r * advantage, clip(r, 1 - c.seq_clip_ratio_low, 1 + c.seq_clip_ratio_high) * advantage)
        else:
            s = clip(r, 1 - c.neg_seq_clip_ratio_low, 1 + c.neg_seq_clip_ratio_high) * advantage
        total += min(w, c.seq_tis_imp_ratio_cap) * s
        ratios.append(r)
    return -total / len(ratios), ratios


def numeric_gradient(batch: Batch, config: TBPOConfig, h: float = 1e-6) -> Tensor:
    """Central differences of the equation."""
    theta_BT = batch.theta_BT.double().tolist()
    grad_BT = torch.zeros(batch.theta_BT.shape, dtype=torch.float64)
    for b, row in enumerate(theta_BT):
        for t, value in enumerate(row):
            row[t] = value + h
            above, _ = equation(theta_BT, batch, config)
            row[t] = value - h
            below, _ = equation(theta_BT, batch, config)
            row[t] = value
            grad_BT[b, t] = (above - below) / (2 * h)
    return grad_BT


def away_from_bounds(ratios: list[float], c: TBPOConfig) -> bool:
    """No ratio so near a bound that float32, or a step of the differences, falls on its other side."""
    bounds = (
        1 + c.seq_clip_ratio_high,
        1 - c.seq_clip_ratio_low,
        1 + c.neg_seq_clip_ratio_high,
        1 - c.neg_seq_clip_ratio_low,
    )
    return all(abs(r - bound) > 1e-5 for r in ratios for bound in bounds)


@given(batch=BATCHES, config=CONFIGS)
@settings(max_examples=100, deadline=None)
def test_loss_and_gradient_are_the_equations(batch: Batch, config: TBPOConfig) -> None:
    expected, ratios = equation(batch.theta_BT.tolist(), batch, config)
    assume(away_from_bounds(ratios, config))
    loss, grad_BT, metrics = batch.run(config)
    # float32 ratios: relative errors of some 1e-7, and terms of either sign.
    assert loss.item() == pytest.approx(expected, rel=1e-5, abs=1e-5)
    torch.testing.assert_close(grad_BT.double(), numeric_gradient(batch, config), rtol=1e-4, atol=1e-6)
    assert metrics["actor/loss"] == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert metrics["actor/seq_ratio_mean"] == pytest.approx(sum(ratios) / len(ratios), rel=1e-5)
    assert metrics["actor/seq_ratio_max_dev"] == pytest.approx(max(abs(r - 1) for r in ratios), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(
    ("advantage", "ratio", "kept", "bound"),
    [
        (1.0, 1 + 3e-4, True, ""),
        (1.0, 1 + 5e-4, False, "pos_high"),
        (1.0, 1 - 2e-4, True, ""),
        (1.0, 1 - 5e-4, True, ""),  # the minimum takes the unclipped side
        (1.0, 0.5, True, ""),
        (1.0, 2.0, False, "pos_high"),
        (-1.0, 1 + 6e-4, True, ""),
        (-1.0, 1 + 8e-4, False, "neg_high"),
        (-1.0, 1 - 2e-4, True, ""),
        (-1.0, 1 - 4e-4, False, "neg_low"),
        (-1.0, 0.5, False, "neg_low"),
        (-1.0, 2.0, False, "neg_high"),
    ],
)
def test_published_band(advantage: float, ratio: float, kept: bool, bound: str) -> None:
    _, grad_BT, metrics = one(advantage, ratio).run(PUBLISHED)
    if kept:
        torch.testing.assert_close(grad_BT, torch.full((1, 4), -advantage * ratio / 4))
    else:
        assert not grad_BT.any()
    assert metrics["actor/clip_fraction"] == (0.0 if kept else 1.0)
    fractions = {name.removeprefix("actor/clip_fraction_"): v for name, v in metrics.items() if "fraction_" in name}
    sign = ["pos_high"] if advantage > 0 else ["neg_low", "neg_high"]  # the other sign has no sequence, so no fraction
    assert fractions == {name: float(name == bound) for name in sign}


def test_clip_fractions_count_what_binds() -> None:
    cases = [(1.0, 2.0), (1.0, 1.0), (1.0, 0.5), (0.0, 2.0), (-1.0, 2.0), (-1.0, 0.5), (-1.0, 1.0), (-1.0, 0.6)]
    metrics = stack(*(one(advantage, ratio) for advantage, ratio in cases)).run(PUBLISHED)[2]
    assert metrics["actor/clip_fraction"] == 4 / 8
    assert metrics["actor/clip_fraction_pos_high"] == 1 / 4  # a zero advantage has nothing to clip
    assert metrics["actor/clip_fraction_neg_high"] == 1 / 4
    assert metrics["actor/clip_fraction_neg_low"] == 2 / 4


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize(("weight", "used"), [(0.5, 0.5), (1.5, 1.5), (2.5, 2.0), (1000.0, 2.0)])
def test_mismatch_weight_is_capped(weight: float, used: float, advantage: float) -> None:
    loss, grad_BT, metrics = one(advantage, 1.0, weight).run(PUBLISHED)
    assert loss.item() == pytest.approx(-used * advantage, rel=1e-5)
    torch.testing.assert_close(grad_BT, torch.full((1, 4), -used * advantage / 4))
    assert metrics["actor/seq_mismatch_weight_mean"] == pytest.approx(weight, rel=1e-5)
    assert metrics["actor/seq_mismatch_weight_capped"] == float(weight > used)


def test_gradient_reaches_the_current_policy_only() -> None:
    batch = random_batch(0, 3, 5, 0.1)
    theta_BT, prox_BT, samp_BT = (t.clone().requires_grad_() for t in (batch.theta_BT, batch.prox_BT, batch.samp_BT))
    loss, _ = tbpo(Batch(theta_BT, prox_BT, samp_BT, batch.mask_BT, batch.advantage_B).inputs(), WIDE)
    loss.backward()
    assert theta_BT.grad is not None
    assert prox_BT.grad is None
    assert samp_BT.grad is None


@given(batch=BATCHES, junk=st.sampled_from([math.nan, math.inf, -math.inf, 1e38]))
@settings(max_examples=40, deadline=None)
def test_masked_positions_never_matter(batch: Batch, junk: float) -> None:
    loss, grad_BT, metrics = batch.run(WIDE)
    dirty = replace(
        batch,
        theta_BT=batch.theta_BT.masked_fill(~batch.mask_BT, junk),
        prox_BT=batch.prox_BT.masked_fill(~batch.mask_BT, -junk),
        samp_BT=batch.samp_BT.masked_fill(~batch.mask_BT, junk),
    )
    dirty_loss, dirty_grad_BT, dirty_metrics = dirty.run(WIDE)
    assert torch.equal(loss, dirty_loss)
    assert torch.equal(grad_BT, dirty_grad_BT)
    assert not dirty_grad_BT[~batch.mask_BT].any()
    assert metrics == dirty_metrics


@given(batch=BATCHES, data=st.data())
@settings(max_examples=40, deadline=None)
def test_order_of_sequences_does_not_matter(batch: Batch, data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(len(batch.advantage_B))))
    loss, grad_BT, _ = batch.run(WIDE)
    mixed_loss, mixed_grad_BT, _ = batch.pick(order).run(WIDE)
    torch.testing.assert_close(mixed_loss, loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(mixed_grad_BT, grad_BT[torch.tensor(order)], rtol=1e-5, atol=1e-7)


@given(batch=BATCHES, size=st.integers(1, 4), config=CONFIGS)
@settings(max_examples=40, deadline=None)
def test_micro_batches_add_up_to_the_whole(batch: Batch, size: int, config: TBPOConfig) -> None:
    count = len(batch.advantage_B)
    loss, grad_BT, metrics = batch.run(config)
    total, grads, parts = 0.0, [], []
    for start in range(0, count, size):
        part = batch.pick(range(start, min(start + size, count)))
        part_loss, part_grad_BT, _ = part.run(config, num_sequences=count)
        parts.append(partial_metrics(part, config, count))
        total += part_loss.item()
        grads.append(part_grad_BT)
    assert total == pytest.approx(loss.item(), rel=1e-5, abs=1e-6)
    torch.testing.assert_close(torch.cat(grads), grad_BT, rtol=1e-5, atol=1e-7)
    assert numbers(parts) == pytest.approx(metrics, rel=1e-5, abs=1e-6)


def partial_metrics(batch: Batch, config: TBPOConfig, num_sequences: int) -> Metrics:
    return tbpo(batch.inputs(num_sequences), config)[1]


@given(batch=BATCHES)
@settings(max_examples=40, deadline=None)
def test_on_policy_it_is_the_policy_gradient(batch: Batch) -> None:
    prox_BT = batch.prox_BT
    _, grad_BT, metrics = replace(batch, theta_BT=prox_BT, samp_BT=prox_BT).run(PUBLISHED)
    logp_BT = prox_BT.double().requires_grad_()
    mean_logp_B = (logp_BT * batch.mask_BT).sum(1) / batch.mask_BT.sum(1)
    (-(batch.advantage_B.double() * mean_logp_B).mean()).backward()
    torch.testing.assert_close(grad_BT.double(), logp_BT.grad, rtol=1e-6, atol=1e-9)
    assert metrics["actor/clip_fraction"] == 0.0
    assert metrics["actor/seq_ratio_max_dev"] == 0.0


def test_empty_response() -> None:
    batch = random_batch(0, 4, 5, 0.1)
    batch.mask_BT[1] = batch.mask_BT[3] = False
    with pytest.raises(ValueError, match=r"sequences \[1, 3\] have no response token"):
        batch.run(PUBLISHED)


@pytest.mark.parametrize("field", ["theta_BT", "prox_BT", "samp_BT"])
@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf])
def test_broken_log_prob_names_its_sequences(field: str, junk: float) -> None:
    batch = random_batch(0, 4, 5, 0.1)
    values_BT = getattr(batch, field).clone()
    values_BT[0, 0] = values_BT[2, 0] = junk
    with pytest.raises(ValueError, match=r"NaN or infinite log-prob in sequences \[0, 2\]"):
        replace(batch, **{field: values_BT}).run(PUBLISHED)


@pytest.mark.parametrize("field", ["theta_BT", "prox_BT", "samp_BT", "mask_BT"])
def test_shapes_must_agree(field: str) -> None:
    batch = random_batch(0, 2, 5, 0.1)
    with pytest.raises(ValueError, match="must have one shape"):
        replace(batch, **{field: getattr(batch, field)[:, :4]}).run(PUBLISHED)


def test_one_advantage_per_sequence() -> None:
    batch = random_batch(0, 2, 5, 0.1)
    with pytest.raises(ValueError, match=r"\(1,\) advantages for 2 sequences"):
        replace(batch, advantage_B=torch.ones(1)).run(PUBLISHED)


def test_log_ratio_is_the_mean_over_response_tokens() -> None:
    logp_BT = torch.tensor([[-1.0, -2.0, -9.0], [-1.0, -1.0, -4.0]])
    reference_BT = torch.tensor([[-2.0, -5.0, math.nan], [-2.0, -2.0, -2.0]])
    mask_BT = torch.tensor([[True, True, False], [True, True, True]])
    ratio_B = Ratios.of(LossInputs(logp_BT, reference_BT, reference_BT, mask_BT, torch.ones(2), 2, 5)).log_r_B
    assert ratio_B.dtype == torch.float32
    assert ratio_B.tolist() == [2.0, 0.0]


def test_log_ratio_of_half_precision_is_float32() -> None:
    logp_BT = torch.full((1, 3), -1.0, dtype=torch.bfloat16)
    reference_BT = torch.full((1, 3), -1.001, dtype=torch.float32)
    mask_BT = torch.ones(1, 3, dtype=torch.bool)
    ratio_B = Ratios.of(LossInputs(logp_BT, reference_BT, reference_BT, mask_BT, torch.ones(1), 1, 3)).log_r_B
    assert ratio_B.item() == pytest.approx(1e-3, rel=1e-3)

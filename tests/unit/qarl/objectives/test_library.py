"""All objectives and corrections: against their equations, against each other, and what must hold for each."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from qarl.config.objective import (
    CISPOConfig,
    DAPOConfig,
    DrGRPOConfig,
    GBPOConfig,
    GRPOConfig,
    GSPOConfig,
    NoCorrection,
    OnPolicyConfig,
    ReinforcePPConfig,
    RLOOConfig,
    SequenceMask,
    SequenceReject,
    SequenceTIS,
    TBPOConfig,
    TokenMask,
    TokenTIS,
)
from qarl.objectives.registry import compute_loss
from tests.support.objective_configs import EVERY, WIDE, label
from tests.support.objectives import (
    BATCHES,
    Batch,
    bounds,
    gradient_bound,
    numbers,
    numeric_gradient,
    random_batch,
    reference_loss,
)

CONFIGS = st.sampled_from(EVERY)


def token(config: Any, advantage: float, ratio: float, weight: float = 1.0) -> tuple[float, float]:
    """Loss and gradient of one response of one token."""
    prox_BT = torch.tensor([[-1.0]], dtype=torch.float64)
    mask_BT = torch.ones(1, 1, dtype=torch.bool)
    samp_BT = prox_BT - math.log(weight)
    batch = Batch(prox_BT + math.log(ratio), prox_BT, samp_BT, mask_BT, torch.tensor([advantage], dtype=torch.float64))
    loss, grad_BT, _ = batch.run(config)
    return loss.item(), grad_BT.item()


# --- against the equations -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", EVERY, ids=label)
@given(batch=BATCHES)
@settings(max_examples=5, deadline=None)
def test_loss_and_gradient_are_the_equations(config: Any, batch: Batch) -> None:
    expected, seen = reference_loss(batch.theta_BT.tolist(), batch, config)
    assume(all(abs(ratio - bound) > 1e-5 for ratio in seen for bound in bounds(config)))
    loss, grad_BT, metrics = batch.run(config)
    assert loss.dtype == torch.float64
    assert loss.item() == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert metrics["actor/loss"] == pytest.approx(expected, rel=1e-9, abs=1e-12)
    numeric_BT = numeric_gradient(lambda theta: reference_loss(theta, batch, config)[0], batch.theta_BT)
    torch.testing.assert_close(grad_BT, numeric_BT, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("config", EVERY, ids=label)
def test_float32_is_near(config: Any) -> None:
    fine = random_batch(0, 6, 5, 0.1)
    coarse = Batch(*(t.float() if t.is_floating_point() else t for t in vars(fine).values()))
    (loss, grad_BT, _), (expected, expected_BT, _) = coarse.run(config), fine.run(config)
    assert loss.dtype == grad_BT.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad_BT.double(), expected_BT, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("config", "advantage", "ratio", "loss", "gradient"),
    [
        # by hand, from min(r A, clip(r) A), its dual clip, and clip(r) A log pi with log pi = -1 + log r
        (GRPOConfig(), 2.0, 1.1, -2.2, -2.2),
        (GRPOConfig(), 2.0, 1.5, -2.4, 0.0),
        (GRPOConfig(), 2.0, 0.5, -1.0, -1.0),
        (GRPOConfig(), -2.0, 0.5, 1.6, 0.0),
        (GRPOConfig(), -2.0, 10.0, 20.0, 20.0),
        (GRPOConfig(clip_ratio_c=3.0), -2.0, 10.0, 6.0, 0.0),
        (DAPOConfig(), 2.0, 1.25, -2.5, -2.5),
        (DAPOConfig(), 2.0, 1.5, -2.56, 0.0),
        (DrGRPOConfig(normalizer=4), 2.0, 1.1, -0.55, -0.55),
        (ReinforcePPConfig(), -2.0, 0.5, 1.6, 0.0),
        (GSPOConfig(), 2.0, 2.0, -2.0008, 0.0),
        (GSPOConfig(), -2.0, 0.5, 1.9994, 0.0),
        (TBPOConfig(), -2.0, 2.0, 2.0014, 0.0),
        (TBPOConfig(), -2.0, 0.5, 1.9994, 0.0),
        (TBPOConfig(dual_clip=False), -2.0, 2.0, 4.0, 4.0),
        (TBPOConfig(positive_only=True), -2.0, 1.0, 0.0, 0.0),
        (GBPOConfig(), 2.0, 1.0, 0.4, -2.0),
        (GBPOConfig(), 2.0, 1.5, 0.6, 3.0),  # beyond the target the gradient points back
        (GBPOConfig(), -2.0, 1.5, 1.4, 3.0),
        (GBPOConfig(), -2.0, 0.5, 0.6, -1.0),
        (CISPOConfig(is_clip_high=0.5), 2.0, math.e, 0.0, -3.0),  # 1.5 * 2 * log pi, and log pi = 0
        (CISPOConfig(), 2.0, 1.0, 2.0, -2.0),
        (OnPolicyConfig(), 2.0, 1.0, 2.0, -2.0),
        (RLOOConfig(), -2.0, 1.0, -2.0, 2.0),
    ],
    ids=lambda value: label(value) if hasattr(value, "kind") else str(value),
)
def test_one_token_by_hand(config: Any, advantage: float, ratio: float, loss: float, gradient: float) -> None:
    assert token(config, advantage, ratio) == pytest.approx((loss, gradient), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(
    ("correction", "weight", "used"),
    [
        (NoCorrection(), 3.0, 1.0),
        (TokenTIS(), 3.0, 2.0),
        (TokenTIS(), 0.1, 0.1),
        (SequenceTIS(), 3.0, 2.0),
        (SequenceTIS(), 0.1, 0.1),
        (TokenMask(), 3.0, 3.0),
        (TokenMask(), 5.5, 0.0),
        (TokenMask(), 0.4, 0.0),
        (SequenceMask(), 1.5, 1.5),
        (SequenceMask(), 2.5, 0.0),
        (SequenceMask(), 0.4, 0.0),
        (SequenceReject(), 1.5, 1.0),
        (SequenceReject(), 2.5, 0.0),
        (SequenceReject(), 0.4, 0.0),
    ],
    ids=lambda value: value.kind if hasattr(value, "kind") else str(value),
)
@pytest.mark.parametrize("objective", [GRPOConfig, GSPOConfig, CISPOConfig, OnPolicyConfig, TBPOConfig])
def test_weights_by_hand(objective: Any, correction: Any, weight: float, used: float) -> None:
    _, gradient = token(objective(correction=correction), 2.0, 1.0, weight)
    assert gradient == pytest.approx(-2.0 * used, rel=1e-9)


def test_the_three_ways_to_average() -> None:
    zeros_BT = torch.zeros(2, 3, dtype=torch.float64)
    mask_BT = torch.tensor([[True, False, False], [True, True, True]])
    batch = Batch(zeros_BT, zeros_BT, zeros_BT, mask_BT, torch.tensor([4.0, 8.0], dtype=torch.float64))
    gradients = {c.kind: batch.run(c)[1] for c in (GRPOConfig(), DAPOConfig(), DrGRPOConfig(normalizer=2))}
    one, other = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([1.0, 1.0, 1.0])
    for kind, first, second in [("grpo", 4 / 2, 8 / 3 / 2), ("dapo", 4 / 4, 8 / 4), ("dr_grpo", 4 / 2 / 2, 8 / 2 / 2)]:
        torch.testing.assert_close(gradients[kind], -torch.stack([first * one, second * other]).double())


# --- what holds for each ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", EVERY, ids=label)
@given(batch=BATCHES, junk=st.sampled_from([math.nan, math.inf, -math.inf, 1e300]), width=st.integers(0, 3))
@settings(max_examples=3, deadline=None)
def test_masked_tokens_and_padding_never_matter(config: Any, batch: Batch, junk: float, width: int) -> None:
    loss, grad_BT, metrics = batch.run(config)

    def soil(values_BT: torch.Tensor, value: float) -> torch.Tensor:
        padded_BT = torch.nn.functional.pad(values_BT.masked_fill(~batch.mask_BT, value), (0, width), value=value)
        return padded_BT

    dirty = Batch(
        soil(batch.theta_BT, junk),
        soil(batch.prox_BT, -junk),
        soil(batch.samp_BT, junk),
        torch.nn.functional.pad(batch.mask_BT, (0, width), value=False),
        batch.advantage_B,
    )
    dirty_loss, dirty_grad_BT, dirty_metrics = dirty.run(config)
    torch.testing.assert_close(dirty_loss, loss, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(dirty_grad_BT[:, : grad_BT.shape[1]], grad_BT, rtol=1e-12, atol=1e-14)
    assert not dirty_grad_BT[~dirty.mask_BT].any()
    assert dirty_metrics == pytest.approx(metrics, rel=1e-12, abs=1e-14)


@pytest.mark.parametrize("config", EVERY, ids=label)
@given(batch=BATCHES, data=st.data(), size=st.integers(1, 3))
@settings(max_examples=4, deadline=None)
def test_order_and_split_do_not_matter(config: Any, batch: Batch, data: st.DataObject, size: int) -> None:
    """Micro-batches of a rank, and the shares of several ranks, are the same thing: parts of one minibatch."""
    count = len(batch.advantage_B)
    order = data.draw(st.permutations(range(count)))
    loss, grad_BT, metrics = batch.run(config)
    parts = [order[i : i + size] for i in range(0, count, size)]
    losses, grads, partial = zip(*(batch.pick(rows).run_part(config, whole=batch) for rows in parts), strict=True)
    torch.testing.assert_close(torch.stack(losses).sum(), loss, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(torch.cat(grads), grad_BT[order], rtol=1e-9, atol=1e-12)
    assert numbers(partial) == pytest.approx(metrics, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("config", EVERY, ids=label)
def test_gradient_reaches_the_current_policy_only(config: Any) -> None:
    batch = random_batch(0, 3, 5, 0.1)
    leaves = [t.clone().requires_grad_() for t in (batch.theta_BT, batch.prox_BT, batch.samp_BT)]
    loss, _ = compute_loss(Batch(*leaves, batch.mask_BT, batch.advantage_B).inputs(), config)
    loss.backward()
    assert [leaf.grad is not None for leaf in leaves] == [True, False, False]


BOUNDED = [
    c
    for c in EVERY
    if c.kind in {"cispo", "on_policy", "rloo"} or getattr(c, "dual_clip", False) or getattr(c, "clip_ratio_c", None)
    if c.correction is None or c.correction.kind != "adaptive_clip"  # which raises the bound with the weight
]


@pytest.mark.parametrize("config", BOUNDED, ids=label)
@given(
    seed=st.integers(0, 10**6),
    drift=st.sampled_from([0.1, 1.0, 10.0, 300.0]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
@settings(max_examples=4, deadline=None)
def test_gradient_is_bounded_however_far_the_policies_part(
    config: Any, seed: int, drift: float, dtype: torch.dtype
) -> None:
    batch = random_batch(seed, 4, 6, drift, dtype=dtype)
    _, grad_BT, _ = batch.run(config)
    assert (grad_BT.abs() <= gradient_bound(config, batch) * (1 + 1e-5)).all()


@pytest.mark.parametrize("config", EVERY, ids=label)
@pytest.mark.parametrize("drift", [30.0, 1000.0])
def test_nothing_overflows(config: Any, drift: float) -> None:
    loss, grad_BT, _ = random_batch(1, 6, 5, drift, dtype=torch.float32).run(config)
    assert torch.isfinite(loss)
    assert torch.isfinite(grad_BT).all()


@given(log_ratio=st.floats(-30, 30), advantage=st.sampled_from([-2.0, -1e-3, 1e-3, 2.0]))
@settings(max_examples=40, deadline=None)
def test_gradient_is_exactly_zero_outside_the_band(log_ratio: float, advantage: float) -> None:
    ratio = math.exp(log_ratio)
    assume(min(abs(ratio - bound) for bound in (0.85, 1.2, 1.3)) > 1e-9)
    outside = ratio > 1.2 if advantage > 0 else not 0.85 <= ratio <= 1.3
    for level in ("sequence", "token"):
        _, gradient = token(TBPOConfig(**WIDE, level=level), advantage, ratio)
        assert (gradient == 0) == outside


def test_clips_of_tokens_are_counted_where_they_bind() -> None:
    log_BT = torch.log(torch.tensor([[2.0, 0.5, 1.0, 9.9], [2.0, 0.5, 4.0, 1.0], [2.0, 0.5, 1.0, 9.9]]))
    zeros_BT = torch.zeros(3, 4)
    mask_BT = torch.tensor([[True, True, True, False], [True] * 4, [True, True, True, False]])
    batch = Batch(log_BT, zeros_BT, zeros_BT, mask_BT, torch.tensor([1.0, -1.0, 0.0]))
    metrics = batch.run(GRPOConfig(clip_ratio_c=3.0))[2]
    assert metrics["actor/clip_fraction"] == pytest.approx(3 / 10)
    assert metrics["actor/clip_fraction_pos_high"] == pytest.approx(1 / 6)  # A = 0 has nothing to clip
    assert metrics["actor/clip_fraction_neg_low"] == pytest.approx(1 / 4)
    assert metrics["actor/clip_fraction_neg_high"] == pytest.approx(1 / 4)


def test_dropped_and_capped_are_counted() -> None:
    weights_BT = torch.log(torch.tensor([[4.0, 1.0, 0.1], [1.0, 1.0, 9.0]], dtype=torch.float64))
    zeros_BT = torch.zeros(2, 3, dtype=torch.float64)
    mask_BT = torch.tensor([[True, True, True], [True, True, False]])
    batch = Batch(zeros_BT, zeros_BT, -weights_BT, mask_BT, torch.ones(2, dtype=torch.float64))

    def metrics(correction: Any) -> dict[str, float]:
        return batch.run(GRPOConfig(correction=correction))[2]

    assert metrics(TokenMask())["actor/token_mismatch_weight_masked"] == pytest.approx(1 / 5)
    assert metrics(TokenMask())["actor/tokens_dropped"] == pytest.approx(1 / 5)
    assert metrics(TokenMask())["actor/sequences_dropped"] == 0
    assert metrics(TokenTIS())["actor/token_mismatch_weight_capped"] == pytest.approx(1 / 5)
    assert metrics(TokenTIS())["actor/tokens_dropped"] == 0
    masked = metrics(SequenceMask(low=0.9))
    assert masked["actor/seq_mismatch_weight_masked"] == pytest.approx(1 / 2)
    assert masked["actor/sequences_dropped"] == pytest.approx(1 / 2)
    assert masked["actor/tokens_dropped"] == pytest.approx(3 / 5)
    assert metrics(SequenceReject())["actor/sequences_dropped"] == 0
    assert metrics(SequenceTIS())["actor/seq_mismatch_weight_capped"] == 0
    w, other = 0.4 ** (1 / 3), 1.0
    plain = metrics(NoCorrection())
    assert plain["actor/seq_mismatch_weight_mean"] == pytest.approx((w + other) / 2)
    assert plain["actor/seq_mismatch_weight_eff_sample_size"] == pytest.approx((w + other) ** 2 / 2 / (w**2 + other**2))
    assert plain["actor/seq_ratio_eff_sample_size"] == 1
    # log w = ln(0.4)/3 = -0.305 and 0: the second bin from below, and the one in the middle of 17
    counts = {int(k.rpartition("/")[2]): v for k, v in plain.items() if "hist/" in k}
    assert len(counts) == 17
    assert {i: n for i, n in counts.items() if n} == {0: 1, 8: 1}


def test_what_is_dropped_has_no_gradient_and_its_length_is_told() -> None:
    log_B1 = torch.log(torch.tensor([[1.0], [1.5], [0.5], [2.0], [1.5]], dtype=torch.float64))
    mask_BT = torch.arange(4) < torch.tensor([[1], [2], [3], [4], [2]])
    zeros_BT = torch.zeros(5, 4, dtype=torch.float64)
    advantage_B = torch.tensor([1.0, 1.0, -1.0, -1.0, 0.0], dtype=torch.float64)
    batch = Batch(log_B1.expand(5, 4), zeros_BT, zeros_BT, mask_BT, advantage_B)
    for config in (TBPOConfig(**WIDE), TBPOConfig(**WIDE, level="token")):
        _, grad_BT, metrics = batch.run(config)
        assert (~grad_BT.any(1)).tolist() == [False, True, True, True, True]  # the last has no advantage
        assert metrics["actor/sequences_dropped"] == pytest.approx(3 / 5)
        assert metrics["actor/tokens_dropped"] == pytest.approx(9 / 12)
        assert metrics["response_length/dropped_mean"] == 3
        assert metrics["response_length/dropped_max"] == 4
        assert metrics["response_length/kept_mean"] == 1.5
        assert metrics["response_length/kept_max"] == 2
    assert batch.run(CISPOConfig())[2]["actor/sequences_dropped"] == 0  # a clipped weight keeps its gradient
    assert batch.run(GBPOConfig())[2]["actor/sequences_dropped"] == 0
    assert "response_length/dropped_mean" not in batch.run(OnPolicyConfig())[2]


@given(batch=BATCHES, config=CONFIGS)
@settings(max_examples=60, deadline=None)
def test_the_dropped_share_is_that_of_tokens_without_gradient(batch: Batch, config: Any) -> None:
    _, grad_BT, metrics = batch.run(config)
    live_BT = batch.mask_BT & (batch.advantage_B != 0)[:, None]
    without_BT = live_BT & (grad_BT == 0)
    assert metrics["actor/tokens_dropped"] == pytest.approx(without_BT.sum().item() / batch.mask_BT.sum().item())
    gone_B = (without_BT == batch.mask_BT).all(1)
    assert metrics["actor/sequences_dropped"] == pytest.approx(gone_B.double().mean().item())

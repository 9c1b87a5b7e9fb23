"""Objectives of which one is a special case of another, and what the corrections come to without a mismatch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qarl.config.objective import (
    CISPOConfig,
    DAPOConfig,
    DrGRPOConfig,
    GRPOConfig,
    GSPOConfig,
    NoCorrection,
    OnPolicyConfig,
    ReinforcePPConfig,
    RLOOConfig,
    SequenceTIS,
    TBPOConfig,
)
from tests.support.objective_configs import CORRECTIONS, EVERY, WIDE
from tests.support.objectives import BATCHES, FULL_BATCHES, Batch, random_batch


def assert_same(batch: Batch, one: Any, other: Any, factor: float = 1.0) -> None:
    loss, grad_BT, _ = batch.run(one)
    other_loss, other_grad_BT, _ = batch.run(other)
    torch.testing.assert_close(loss * factor, other_loss, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(grad_BT * factor, other_grad_BT, rtol=1e-9, atol=1e-12)


@given(batch=BATCHES)
@settings(max_examples=10, deadline=None)
def test_tbpo_without_band_and_cap_is_the_sequence_policy_gradient(batch: Batch) -> None:
    endless = TBPOConfig(**dict.fromkeys(WIDE, 1e9), correction=NoCorrection())
    loss, grad_BT, metrics = batch.run(endless)
    theta_BT = batch.theta_BT.clone().requires_grad_()
    lengths_B = batch.mask_BT.sum(1)
    ratio_B = (((theta_BT - batch.prox_BT) * batch.mask_BT).sum(1) / lengths_B).exp()
    plain = -(batch.advantage_B * ratio_B).mean()
    torch.testing.assert_close(loss, plain.detach(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(grad_BT, torch.autograd.grad(plain, theta_BT)[0], rtol=1e-9, atol=1e-12)
    assert metrics["actor/clip_fraction"] == 0


@given(batch=BATCHES)
@settings(max_examples=10, deadline=None)
def test_one_is_a_special_case_of_another(batch: Batch) -> None:
    none = NoCorrection()
    single = TBPOConfig(**WIDE | {"neg_seq_clip_ratio_low": 0.1}, dual_clip=False, correction=none)
    assert_same(batch, single, GSPOConfig(seq_clip_ratio_low=0.1, seq_clip_ratio_high=0.2))
    dual = GRPOConfig(clip_ratio_low=0.15, clip_ratio_high=0.2, clip_ratio_c=1.3, correction=SequenceTIS())
    assert_same(batch, TBPOConfig(**WIDE, level="token"), dual)
    assert_same(batch, DAPOConfig(clip_ratio_high=0.2), GRPOConfig(aggregation="token_mean"))
    assert_same(batch, ReinforcePPConfig(), GRPOConfig(aggregation="token_mean"))
    positive = replace(batch, advantage_B=batch.advantage_B.clamp(min=0))
    torch.testing.assert_close(batch.run(TBPOConfig(positive_only=True))[1], positive.run(TBPOConfig())[1])


@given(batch=FULL_BATCHES)
@settings(max_examples=10, deadline=None)
def test_equal_lengths_make_the_averages_one(batch: Batch) -> None:
    tokens = batch.mask_BT.shape[1]
    assert_same(batch, GRPOConfig(), GRPOConfig(aggregation="token_mean"))
    assert_same(batch, GRPOConfig(), DrGRPOConfig(normalizer=tokens))
    assert_same(batch, OnPolicyConfig(), RLOOConfig(), factor=tokens)


@given(seed=st.integers(0, 10**6), sequences=st.integers(1, 6), correction=st.sampled_from(CORRECTIONS))
@settings(max_examples=10, deadline=None)
def test_of_one_token_sequence_and_token_objectives_are_one(seed: int, sequences: int, correction: Any) -> None:
    batch = random_batch(seed, sequences, 1, 0.3)
    gspo = GSPOConfig(seq_clip_ratio_low=0.2, seq_clip_ratio_high=0.2, correction=correction)
    assert_same(batch, gspo, GRPOConfig(correction=correction))
    assert_same(batch, TBPOConfig(**WIDE), TBPOConfig(**WIDE, level="token"))


@given(batch=FULL_BATCHES)
@settings(max_examples=6, deadline=None)
def test_on_policy_all_share_one_gradient(batch: Batch) -> None:
    tokens = batch.mask_BT.shape[1]
    batch = replace(batch, theta_BT=batch.prox_BT, samp_BT=batch.prox_BT)
    expected_BT = -(batch.advantage_B / batch.mask_BT.numel())[:, None].expand_as(batch.mask_BT)
    for config in EVERY:
        factor = {"dr_grpo": 7 / tokens, "rloo": 1 / tokens}.get(config.kind, 1.0)
        wanted_BT = expected_BT.clamp(max=0) if getattr(config, "positive_only", False) else expected_BT
        _, grad_BT, metrics = batch.run(config)
        torch.testing.assert_close(grad_BT * factor, wanted_BT, rtol=1e-9, atol=1e-12)
        assert metrics.get("actor/clip_fraction", 0) == metrics["actor/seq_ratio_max_dev"] == 0


@given(batch=BATCHES, correction=st.sampled_from(CORRECTIONS))
@settings(max_examples=10, deadline=None)
def test_without_mismatch_no_correction_does_anything(batch: Batch, correction: Any) -> None:
    batch = replace(batch, samp_BT=batch.prox_BT)
    for base in (GRPOConfig(), GSPOConfig(), CISPOConfig(), RLOOConfig()):
        assert_same(batch, base, base.model_copy(update={"correction": correction}))

"""TBPO by hand: its published band, its cap, and its metrics."""

from __future__ import annotations

import math

import pytest
import torch

from qarl.config.objective import TBPOConfig
from tests.support.objectives import Batch

PUBLISHED = TBPOConfig()


def one(advantage: float, ratio: float, weight: float = 1.0, tokens: int = 4) -> Batch:
    """One sequence with the given sequence ratio and mismatch weight."""
    prox_BT = torch.linspace(-2, -1, tokens)[None]
    mask_BT = torch.ones(1, tokens, dtype=torch.bool)
    samp_BT = prox_BT - math.log(weight)
    return Batch(prox_BT + math.log(ratio), prox_BT, samp_BT, mask_BT, torch.tensor([advantage]))


def stack(*batches: Batch) -> Batch:
    return Batch(*map(torch.cat, zip(*(vars(batch).values() for batch in batches), strict=True)))


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
    assert metrics["actor/seq_ratio_mean"] == pytest.approx(9.6 / 8, rel=1e-6)
    assert metrics["actor/seq_ratio_max_dev"] == pytest.approx(1.0, rel=1e-6)
    assert metrics["actor/ppo_kl"] == pytest.approx(-(math.log(2) + math.log(0.6)) / 8, rel=1e-5)


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize(("weight", "used"), [(0.5, 0.5), (1.5, 1.5), (2.5, 2.0), (1000.0, 2.0)])
def test_mismatch_weight_is_capped(weight: float, used: float, advantage: float) -> None:
    loss, grad_BT, metrics = one(advantage, 1.0, weight).run(PUBLISHED)
    assert loss.item() == pytest.approx(-used * advantage, rel=1e-5)
    torch.testing.assert_close(grad_BT, torch.full((1, 4), -used * advantage / 4))
    assert metrics["actor/seq_mismatch_weight_mean"] == pytest.approx(weight, rel=1e-5)
    assert metrics["actor/seq_mismatch_weight_capped"] == float(weight > used)

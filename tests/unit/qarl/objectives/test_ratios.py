"""The log-ratios that every loss starts from."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from qarl.errors import ObjectiveError
from qarl.objectives.ratios import LossInputs, Ratios
from tests.support.objectives import random_batch


def test_sequences_without_ids_are_counted() -> None:
    batch = random_batch(0, 4, 5, 0.1)
    theta_BT, mask_BT = batch.theta_BT.clone(), batch.mask_BT.clone()
    theta_BT[0, 0] = theta_BT[2, 0] = math.nan
    mask_BT[1] = mask_BT[3] = False
    with pytest.raises(ObjectiveError, match=r"NaN or infinite log-prob in sequences \[0, 2\]"):
        Ratios.of(replace(batch, theta_BT=theta_BT).inputs())
    with pytest.raises(ObjectiveError, match=r"sequences \[1, 3\] have no response token"):
        Ratios.of(replace(batch, mask_BT=mask_BT).inputs())


def test_the_mask_has_the_shape_of_the_log_probs() -> None:
    batch = random_batch(0, 2, 5, 0.1)
    with pytest.raises(ObjectiveError, match="must have one shape"):
        Ratios.of(replace(batch, mask_BT=batch.mask_BT[:, :4]).inputs())


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

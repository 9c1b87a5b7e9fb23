"""Numbers from the test suites of other projects; copied are inputs and expected values only.

Their advantages are per token, ours per sequence: but for GSPO each of their tokens is a response of one token here,
which leaves the mean over tokens as it is.
"""

from __future__ import annotations

import statistics
from typing import Any

import pytest
import torch

from qarl.config.objective import (
    CISPOConfig,
    DAPOConfig,
    GRPOConfig,
    GSPOConfig,
    OnPolicyConfig,
    SequenceTIS,
    TokenMask,
    TokenTIS,
)
from tests.support.objectives import Batch

# NVIDIA-NeMo/RL, tests/unit/algorithms/data/clipped_pg_loss_goldens.json at 4e6a3f2 (float64): the five unmasked
# tokens of `base_inputs`. Its denominators carry an epsilon, so its values differ from the equations by 2e-9 of them.
ADVANTAGE = [1.2, -0.7, 0.4, -1.1, 0.6]
PREV = [-1.0, -1.1, -0.8, -0.9, -1.0]
GENERATION = [-1.2, -1.5, -0.7, -1.4, -0.7]
CURRENT = [-1.6, -0.8, -1.1, -0.7, -1.4]
CLIPPED = [-0.13171479239913675, 0.18898023268267997, -0.05926545753600652, 0.26870860625782017, -0.08043840536339991]


def column(values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)[:, None]


@pytest.mark.parametrize(
    ("config", "changes", "loss", "gradient"),
    [
        pytest.param(GRPOConfig(), {}, 0.18627018364195694, CLIPPED, id="ppo_token"),
        pytest.param(
            OnPolicyConfig(),
            {},
            0.373999999252,
            [-0.23999999952, 0.13999999972, -0.07999999984, 0.21999999956000002, -0.11999999976],
            id="reinforce",
        ),
        pytest.param(
            GRPOConfig(clip_ratio_c=3.0), {1: -3.0}, 0.417289950119277, [CLIPPED[0], 0.0, *CLIPPED[2:]], id="dual_clip"
        ),
        pytest.param(
            CISPOConfig(is_clip_low=0.2, is_clip_high=0.2, correction=TokenTIS(cap=1e9)),
            {},
            0.03329652014119518,
            [-0.23450932909773395, 0.2506265487024803, -0.057909594638482234, 0.435262414594309, -0.07111854904320782],
            id="cispo_with_token_is",
        ),
        pytest.param(
            DAPOConfig(clip_ratio_high=0.2, correction=TokenTIS(cap=1.3)),
            {},
            0.3209028399844618,
            [-0.1608768107267998, 0.24567430248748398, -0.05362560357559994, 0.3493211881351662, -0.059590236335788666],
            id="tis_token",
        ),
        pytest.param(
            GRPOConfig(correction=TokenMask(low=0.75, high=1.25)),
            {},
            -0.21450241430239975,
            [-0.1608768107267998, 0.0, -0.05362560357559994, 0.0, 0.0],
            id="icepop_token",
        ),
    ],
)
def test_nemo_rl_goldens(config: Any, changes: dict[int, float], loss: float, gradient: list[float]) -> None:
    prev = [changes.get(i, value) for i, value in enumerate(PREV)]
    mask_BT = torch.ones(5, 1, dtype=torch.bool)
    batch = Batch(column(CURRENT), column(prev), column(GENERATION), mask_BT, column(ADVANTAGE)[:, 0])
    found, grad_BT, _ = batch.run(config)
    assert found.item() == pytest.approx(loss, rel=1e-8)
    assert grad_BT[:, 0].tolist() == pytest.approx(gradient, rel=1e-8)


def test_nemo_rl_golden_of_gspo() -> None:
    """Its case `gspo_sequence_is`: responses of three and two tokens, ratios of which none is clipped.

    As none is, the loss is linear in the advantage, and the mean of a response's token advantages is as good as they.
    Its weight is the product of the token weights, ours their geometric mean: here each token has the whole product.
    """
    rows, width = [slice(0, 3), slice(3, 5)], 3

    def padded(values: list[list[float]]) -> torch.Tensor:
        return torch.tensor([row + [0.0] * (width - len(row)) for row in values], dtype=torch.float64)

    products = [sum(PREV[row]) - sum(GENERATION[row]) for row in rows]
    sampler = [[value - product for value in PREV[row]] for row, product in zip(rows, products, strict=True)]
    advantages = torch.tensor([statistics.fmean(ADVANTAGE[row]) for row in rows], dtype=torch.float64)
    mask_BT = torch.tensor([[True, True, True], [True, True, False]])
    theta_BT, prox_BT = (padded([values[row] for row in rows]) for values in (CURRENT, PREV))
    config = GSPOConfig(seq_clip_ratio_low=0.2, seq_clip_ratio_high=0.2, correction=SequenceTIS(cap=1e9))
    loss, grad_BT, metrics = Batch(theta_BT, prox_BT, padded(sampler), mask_BT, advantages).run(config)
    assert metrics["actor/clip_fraction"] == 0
    assert loss.item() == pytest.approx(-0.06433245613699731, rel=1e-8)
    gradients = [-0.06749293963637779] * 3 + [0.06907318137816686] * 2
    assert grad_BT[mask_BT].tolist() == pytest.approx(gradients, rel=2e-8)  # of three of their denominators


# google-deepmind/rlax, rlax/_src/policy_gradients_test.py at 461b4cf, to its own tolerance of 1e-4.
LOGITS = torch.tensor([[1.0, 1.0, 1.0], [2.0, 0.0, 0.0], [-1.0, -2.0, -3.0]])
OLD_LOGITS = torch.tensor([[1.0, 1.0, 1.0], [2.0, 0.0, 0.0], [-3.0, -2.0, -1.0]])


def rlax_batch(logits: torch.Tensor, old: torch.Tensor, actions: list[int], advantages: list[float]) -> Batch:
    index = torch.tensor(actions)[:, None]
    theta_BT, prox_BT = (x.log_softmax(-1).gather(1, index) for x in (logits, old))
    return Batch(theta_BT, prox_BT, prox_BT, torch.ones(3, 1, dtype=torch.bool), torch.tensor(advantages))


@pytest.mark.parametrize(("sign", "expected"), [(1.0, -0.17117467), (-1.0, 0.19333333)])
def test_rlax_clipped_surrogate(sign: float, expected: float) -> None:
    batch = rlax_batch(LOGITS, OLD_LOGITS, [0, 1, 2], [0.3 * sign, 0.2 * sign, 0.1 * sign])
    assert batch.run(GRPOConfig())[0].item() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("actions", "advantages", "weights", "expected"),
    [
        ([0, 1, 2], [0.3, 0.2, 0.1], [-2.0, 2.0, 0.0], 0.0788835088),
        ([0, 0, 0], [-0.3, -0.2, -0.1], [-3.0, 1.0, -1.0], 0.327200909),
    ],
)
def test_rlax_policy_gradient(
    actions: list[int], advantages: list[float], weights: list[float], expected: float
) -> None:
    weighted = [a * w for a, w in zip(advantages, weights, strict=True)]
    batch = rlax_batch(LOGITS, LOGITS, actions, weighted)
    assert batch.run(OnPolicyConfig())[0].item() == pytest.approx(expected, abs=1e-4)

"""What counts as clipped and as dropped beside a correction, by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qarl.config.objective import (
    CISPOConfig,
    GBPOConfig,
    GRPOConfig,
    NoCorrection,
    SequenceMask,
    SequenceReject,
    TBPOConfig,
    TokenMask,
)
from tests.support.objectives import Batch


def test_a_clip_counts_only_where_its_branch_makes_the_term() -> None:
    log_r_BT = torch.log(torch.tensor([[2.0, 2.0], [2.0, 2.0], [0.5, 2.0]], dtype=torch.float64))
    log_w_BT = torch.log(torch.tensor([[9.0, 1.0], [1.0, 1.0], [1.0, 1.0]], dtype=torch.float64))
    zeros_BT, mask_BT = torch.zeros(3, 2, dtype=torch.float64), torch.ones(3, 2, dtype=torch.bool)
    batch = Batch(log_r_BT, zeros_BT, -log_w_BT, mask_BT, torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64))

    def clips(config: Any) -> dict[str, float]:
        found = batch.run(config)[2].items()
        return {name.removeprefix("actor/clip_fraction"): value for name, value in found if "clip_fraction" in name}

    tokens = {"": 2 / 6, "_pos_high": 1 / 4, "_neg_low": 1 / 2, "_neg_high": 0}
    sequence = {"": 1 / 6, "_pos_high": 0, "_neg_low": 1 / 2, "_neg_high": 0}  # the first has w = 3
    assert clips(GRPOConfig(correction=TokenMask())) == pytest.approx(tokens)
    assert clips(GRPOConfig(correction=SequenceMask())) == pytest.approx(sequence)
    assert clips(GBPOConfig(correction=TokenMask())) == pytest.approx(tokens)
    assert clips(TBPOConfig(correction=SequenceReject())) == {"": 0, "_pos_high": 0, "_neg_low": 0, "_neg_high": 0}
    both = {"is_clip_low": 0.2, "is_clip_high": 0.3}
    assert clips(CISPOConfig(**both)) == pytest.approx({"": 4 / 6, "_high": 3 / 6, "_low": 1 / 6})
    assert clips(CISPOConfig(**both, correction=TokenMask())) == pytest.approx(
        {"": 3 / 6, "_high": 2 / 6, "_low": 1 / 6}
    )
    assert clips(CISPOConfig(**both, correction=SequenceMask()))[""] == pytest.approx(2 / 6)


@pytest.mark.parametrize("correction", [NoCorrection(), TokenMask(), SequenceMask()], ids=lambda c: c.kind)
@pytest.mark.parametrize("level", ["sequence", "token"])
def test_positive_only_drops_negatives_and_counts_clips_of_the_rest(level: Any, correction: Any) -> None:
    log_r_B1 = torch.log(torch.tensor([[1.0], [2.0], [1.0], [2.0]], dtype=torch.float64))
    mask_BT = torch.arange(3) < torch.tensor([[1], [2], [3], [2]])
    zeros_BT = torch.zeros(4, 3, dtype=torch.float64)
    advantage_B = torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64)
    batch = Batch(log_r_B1.expand(4, 3), zeros_BT, zeros_BT, mask_BT, advantage_B)
    config = TBPOConfig(positive_only=True, level=level, correction=correction)
    metrics = batch.run(config)[2]
    assert metrics["actor/sequences_dropped"] == pytest.approx(3 / 4)
    assert metrics["actor/tokens_dropped"] == pytest.approx(7 / 8)
    assert metrics["response_length/kept_max"] == 1
    assert metrics["response_length/dropped_max"] == 3
    assert metrics["actor/clip_fraction_pos_high"] == pytest.approx(1 / 2 if level == "sequence" else 2 / 3)
    assert metrics["actor/clip_fraction"] == pytest.approx(1 / 4)
    assert metrics["actor/clip_fraction_neg_high"] == 0

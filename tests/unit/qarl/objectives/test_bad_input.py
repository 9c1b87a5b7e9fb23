"""Inputs of which no loss can be made: one error each, which names the sequences."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from qarl.errors import ObjectiveError
from qarl.objectives.registry import compute_loss
from tests.support.objective_configs import PLAIN, label
from tests.support.objectives import random_batch

FIELDS = {
    "learner": "logp_theta_BT",
    "prox": "logp_prox_BT",
    "sampler": "logp_samp_BT",
    "reference": "logp_ref_BT",
    "entropy": "entropy_BT",
}


@pytest.mark.parametrize("config", PLAIN, ids=label)
def test_bad_input_names_its_sequences(config: Any) -> None:
    good = replace(random_batch(0, 3, 4, 0.1, full=True).inputs(), ids=["a", "b", "c"])

    def fault(**changes: Any) -> str:
        with pytest.raises(ObjectiveError) as caught:
            compute_loss(replace(good, **changes), config)
        return str(caught.value)

    def with_value(values: torch.Tensor, row: int, value: Any) -> torch.Tensor:
        values = values.clone()
        values[row] = value
        return values

    for name in ("logp_theta_BT", "logp_prox_BT", "logp_samp_BT"):
        for junk in (math.nan, math.inf, -math.inf):
            broken_BT = with_value(getattr(good, name), 1, junk)
            assert fault(**{name: broken_BT}).startswith("NaN or infinite log-prob in sequences ['b']; lower ")
    shapes = "(3, 2) and mask (3, 4) of sequences ['a', 'b', 'c'] must have one shape"
    short_BT = good.logp_samp_BT[:, :2]
    for field, name in FIELDS.items():
        assert fault(**{name: short_BT}) == f"{field} {shapes}"
    assert fault(mask_BT=good.mask_BT[:2], advantage_B=good.advantage_B[:2], ids=["a", "b"]) == (
        "learner (3, 4), prox (3, 4), sampler (3, 4) and mask (2, 4) of sequences ['a', 'b'] must have one shape"
    )
    assert fault(mask_BT=with_value(good.mask_BT, 2, False)) == "sequences ['c'] have no response token"
    assert fault(advantage_B=good.advantage_B[:2]) == "(2,) advantages for 3 sequences ['a', 'b', 'c']"
    assert (
        fault(advantage_B=with_value(good.advantage_B, 0, math.nan)) == "NaN or infinite advantage of sequences ['a']"
    )
    broken_BT = with_value(good.logp_samp_BT, 1, math.nan)
    assert fault(entropy_BT=broken_BT).startswith("NaN or infinite entropy in sequences ['b']; lower ")
    assert fault(logp_ref_BT=-broken_BT).startswith("NaN or infinite log-prob in sequences ['b']; lower ")
    assert fault(ids=["a"], advantage_B=good.advantage_B[:2]) == "1 ids ['a'] for 3 sequences"
    for sizes in ({"num_sequences": 0}, {"num_tokens": 0}, {"num_sequences": 2}):
        assert fault(**sizes).startswith("sequences ['a', 'b', 'c'] with 12 tokens exceed their minibatch: ")

"""The bench measures every objective, and none makes a tensor larger than the log-probs."""

from __future__ import annotations

import torch

from launch.tools.bench import objectives
from qarl.config.objective import DrGRPOConfig
from qarl.objectives.registry import OBJECTIVES


def test_every_objective_is_measured_and_none_makes_a_larger_tensor() -> None:
    lines = list(objectives.bench(rounds=1, sequences=8, tokens=64))
    kinds = {kind.model_fields["kind"].default for kind in OBJECTIVES}
    timed = {line.split("|")[1].partition(": ")[2].strip() for line in lines if line.startswith("| 8 x 64 tokens")}
    largest = {
        name: float(rest.split()[2]) for name, _, rest in (line.partition(": ") for line in lines) if "x the" in rest
    }
    assert kinds <= timed
    assert timed == set(largest)
    assert {name: size for name, size in largest.items() if size > 1} == {}


def test_a_larger_tensor_would_be_seen() -> None:
    with objectives.LargestTensor() as largest:
        torch.ones(4, 5).repeat(3, 1).sum()
    assert largest.bytes == 4 * 5 * 3 * 4


def test_dr_grpo_has_a_constant() -> None:
    assert objectives.subjects(64)["dr_grpo"] == DrGRPOConfig(normalizer=64)

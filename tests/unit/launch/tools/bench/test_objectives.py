"""The bench measures every objective, and none makes a tensor larger than the log-probs."""

from __future__ import annotations

import pytest
import torch

from launch.tools.bench import objectives
from qarl.config.objective import DrGRPOConfig
from qarl.objectives.registry import OBJECTIVES


def test_every_objective_is_measured_and_none_makes_a_larger_tensor() -> None:
    rows = objectives.bench(repeats=1, sequences=8, tokens=64)
    kinds = {kind.model_fields["kind"].default for kind in OBJECTIVES}
    assert kinds <= {name for name, *_ in rows}
    assert {name: largest for name, _, _, largest in rows if largest > 1} == {}


def test_a_larger_tensor_would_be_seen() -> None:
    with objectives.LargestTensor() as largest:
        torch.ones(4, 5).repeat(3, 1).sum()
    assert largest.bytes == 4 * 5 * 3 * 4


def test_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [("masked mean", 1.0, 1.0, 1.0), ("slow", 9.0, 9.0, 1.0)]
    monkeypatch.setattr(objectives, "bench", lambda: rows)
    objectives.main()
    lines = capsys.readouterr().out.splitlines()
    assert ["above the target" in line for line in lines] == [False, False, False, True]


def test_dr_grpo_has_a_constant() -> None:
    assert objectives.subjects()["dr_grpo"] == DrGRPOConfig(normalizer=objectives.TOKENS)

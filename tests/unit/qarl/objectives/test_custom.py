"""An objective of the user's own: the example of the documentation, what is added to it, and what it may not return."""

from __future__ import annotations

import math
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml

from qarl.config.io import validate
from qarl.config.objective import CustomConfig, GSPOConfig, TBPOConfig
from qarl.errors import ConfigError, DivergenceError, ObjectiveError
from qarl.metrics import Metric, maximum
from qarl.objectives.custom import check_objective
from qarl.objectives.ratios import LossInputs
from tests.support.objectives import numbers, random_batch

DOCS = Path(__file__).parents[4] / "docs" / "objectives.md"


def block(language: str) -> str:
    """The code block in that language below the heading "Your own objective"."""
    section = DOCS.read_text().partition("## Your own objective\n")[2].partition("\n## ")[0]
    found = re.search(rf"```{language}\n(.*?)```", section, re.DOTALL)
    assert found
    return found[1]


@pytest.fixture
def documented(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CustomConfig:
    """The documented config, beside the documented file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_objective.py").write_text(block("python"))
    tree = {"model": {"path": "x"}, "task": {"kind": "sorting"}, **yaml.safe_load(block("yaml"))}
    objective = validate(tree, "docs").objective
    assert isinstance(objective, CustomConfig)
    return objective


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("drift", [1e-4, 0.1, 1.0])
def test_the_documented_copy_of_gspo_has_its_bits(documented: CustomConfig, drift: float, dtype: torch.dtype) -> None:
    for seed in range(10):
        batch = random_batch(seed, 7, 9, drift, dtype=dtype)
        loss, grad_BT, metrics = batch.run(documented)
        expected, expected_BT, of_gspo = batch.run(GSPOConfig())
        assert torch.equal(loss, expected)
        assert torch.equal(grad_BT, expected_BT)
        shared = {name for name in of_gspo if "seq_ratio" in name} | {"actor/loss", "actor/ppo_kl"}
        assert len(shared) == 5
        assert {name: metrics[name] for name in shared} == pytest.approx({name: of_gspo[name] for name in shared})
        assert {"mine/outside", "mine/tokens_outside"} <= metrics.keys()


def returning(monkeypatch: pytest.MonkeyPatch, result: Any, **more: Any) -> CustomConfig:
    """A config whose function returns `result(inputs, **kwargs)`."""
    module = ModuleType("objective_under_test")
    module.loss = result  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return CustomConfig(function="objective_under_test:loss", **more)


def plain(inputs: LossInputs) -> torch.Tensor:
    return torch.where(inputs.mask_BT, inputs.logp_theta_BT, 0.0).sum() / inputs.num_sequences


def test_micro_batches_merge_and_numbers_are_means_over_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    def loss(inputs: LossInputs) -> tuple[torch.Tensor, dict[str, float | Metric]]:
        advantage_B = inputs.advantage_B
        count = Metric(len(advantage_B), reduction="sum")
        return plain(inputs), {"mine/a": advantage_B.mean().item(), "mine/max": maximum(2.0), "mine/n": count}

    config = returning(monkeypatch, loss)
    batch = random_batch(0, 5, 4, 0.1)
    whole, _, metrics = batch.run(config)
    parts = [batch.pick(rows).run_part(config, whole=batch) for rows in ([0, 1, 2], [3], [4])]
    torch.testing.assert_close(torch.stack([part[0] for part in parts]).sum(), whole)
    assert numbers([part[2] for part in parts]) == pytest.approx(metrics)
    assert metrics["mine/a"] == pytest.approx(batch.advantage_B.mean().item())
    assert (metrics["mine/max"], metrics["mine/n"]) == (2.0, 5.0)
    assert metrics["actor/loss"] == pytest.approx(whole.item())


def test_penalty_and_bonus_apply(monkeypatch: pytest.MonkeyPatch) -> None:
    from qarl.objectives.registry import compute_loss

    config = returning(monkeypatch, lambda inputs: (plain(inputs), {}), kl_coef=0.5, entropy_coef=0.25)
    batch = random_batch(0, 3, 4, 0.1)
    theta_BT = batch.theta_BT.clone().requires_grad_()
    inputs = replace(
        replace(batch, theta_BT=theta_BT).inputs(), logp_ref_BT=batch.samp_BT, entropy_BT=theta_BT.square()
    )
    loss, metrics = compute_loss(inputs, config)
    found = numbers([metrics])
    entropy = torch.where(batch.mask_BT, theta_BT.square(), 0.0).sum(1) / batch.mask_BT.sum(1)
    expected = plain(inputs) + 0.5 * found["actor/kl_loss"] - 0.25 * entropy.mean()
    assert loss.item() == pytest.approx(expected.item())


@pytest.mark.parametrize(
    ("result", "line"),
    [
        (lambda i: plain(i), "a Tensor, not (loss, metrics)"),
        (lambda i: (1.0, {}), "a loss of type float, not a tensor"),
        (lambda i: (i.logp_theta_BT.sum(1), {}), "a loss of shape (3,), not a scalar; "),
        (lambda i: (plain(i).detach(), {}), "a loss without gradient; "),
        (lambda i: (plain(i), [1.0]), "metrics of type list, not a dict"),
        (lambda i: (plain(i), {"mine/x": plain(i)}), "the metric 'mine/x' of type Tensor; "),
        (lambda i: (plain(i), {1: 1.0}), "the metric 1 of type float; "),
        (lambda i: (plain(i) * math.nan, {}), "the loss nan"),
    ],
)
def test_what_it_may_not_return(result: Any, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = returning(monkeypatch, result)
    with pytest.raises(ObjectiveError) as caught:
        random_batch(0, 3, 4, 0.1).run(config)
    assert line in str(caught.value)
    assert "objective.function objective_under_test:loss returned " in str(caught.value)
    assert isinstance(caught.value, DivergenceError) == ("nan" in line)


def test_the_function_is_checked_before_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def loss(inputs: LossInputs, low: float) -> tuple[torch.Tensor, dict[str, float]]:
        return plain(inputs) * low, {}

    check_objective(TBPOConfig())
    check_objective(returning(monkeypatch, loss, kwargs={"low": 1.0}))
    with pytest.raises(ConfigError, match=r"objective\.function: loss cannot be called as loss\(inputs, high=1\.0\): "):
        check_objective(returning(monkeypatch, loss, kwargs={"high": 1.0}))
    with pytest.raises(ConfigError, match=r"objective\.function: 'loss' names no function; write module:function"):
        check_objective(CustomConfig(function="loss"))

"""`qarl bench steps` around runs that log what real ones would."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from launch.cli import main
from launch.commands.bench import ROWS
from launch.demo.tiny_model import make_tokenizer
from launch.tools.bench import steps
from launch.tools.plan.devices import device_called
from launch.tools.plan.timing import ModelTimes
from qarl.config.io import load_config
from qarl.config.shipped import config_path
from tests.support.numerics_models import tiny_model


def test_a_row_for_each_settings_with_the_plans_estimate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_model("qwen3").save_pretrained("model")
    make_tokenizer(32).save_pretrained("model")
    config = tmp_path / "tiny.yaml"
    config.write_text(f"inherits: {config_path('quickstart').resolve()}\nmodel: {{path: {tmp_path}/model}}\n")
    asked: list[list[str]] = []

    def run(name: str, overrides: Sequence[str], count: int, log: Path) -> tuple[list[dict[str, Any]], int]:
        asked.append(list(overrides))
        scale = 2.0 if "rollout.scheme=none" in overrides else 1.0
        row = {"timing_s/step": 4.0, "timing_s/sample": 1.0, "timing_s/update": 2.0, "timing_s/publish": 0.5}
        proving = {**row, "timing_s/prox": 0.5}
        rows = [{key: scale * value for key, value in one.items()} for one in (row, row, proving)]
        return [{**one, "response_length/mean": 8.0} for one in rows], 3 * 2**30

    monkeypatch.setattr(steps, "qarl_run", run)
    monkeypatch.setattr(steps, "measure", lambda device: device)
    monkeypatch.setattr("launch.tools.plan.planner.time_model", lambda *args: ModelTimes(0.1, 0.2, 0.25, 1.5))
    settings = ["rollout.scheme=none", "", "learner.prox=recompute train.group_size=4"]
    assert main(["bench", "steps", str(config), "--settings", *settings, "--overrides", "seed=1"]) == 0
    assert asked == [["mismatch.proof_steps=1", "seed=1", *text.split()] for text in settings]
    none, own, recompute = (line for line in capsys.readouterr().out.splitlines() if " GiB" not in line and "(" in line)
    assert none.startswith("| rollout.scheme=none | 8.00 (")
    assert none.endswith(" | 3.0 | 1.00 |")
    assert own.startswith("| as configured | 4.00 (")
    assert own.endswith(" | 3.0 | 2.00 |")
    plan = steps._estimate(str(config), ["seed=1"], [{"response_length/mean": 8.0}], device_called("cpu"))
    assert f"| 1.00 ({plan.rollout_s:.2f}) | 2.00 ({plan.learner_s:.2f}) | 0.50 ({plan.publication_s:.2f}) |" in own
    assert " | 2.00 (1.50) | " in own
    assert " | 2.00 (1.75) | " in recompute  # with a forward for pi_prox


@pytest.mark.parametrize("settings", ROWS)
@pytest.mark.parametrize("name", ["quickstart", "smollm2_chain_sum"])
def test_the_default_rows_are_configs_of_the_shipped_recipes(name: str, settings: str) -> None:
    config = load_config(config_path(name), settings.split())
    assert settings.startswith(f"model.dtype={config.model.dtype}")
    assert ("rollout.scheme=none" in settings) == (config.rollout.scheme == "none")

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

from launch.run import wandb_run
from launch.run.wandb_run import WANDB_ID_FILE
from qarl.config.io import load_config
from qarl.config.shipped import config_path

DOCS = Path(__file__).parents[4] / "docs"


def test_the_agent_of_a_sweep_runs_the_command_of_the_docs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """W&B's own code fills in the parameters; the run gets the id that the agent gives it."""
    monkeypatch.setenv("WANDB_RUN_ID", "abc123")
    (text,) = re.findall(r"`sweep.yaml`:\n\n```yaml\n(.*?)```", (DOCS / "tracking.md").read_text(), re.DOTALL)
    sweep = yaml.safe_load(text)
    chosen = {name: {"value": value["values"][0]} for name, value in sweep["parameters"].items()}
    *command, macro = sweep["command"]
    assert command[:2] == [sweep["program"], "train"] == ["qarl", "train"]  # the agent reads `program` in any case
    filled = create_sweep_command_args({"args": chosen})[macro.strip("${}")]
    config = load_config(config_path(command[2]), [*command[3:], *filled])
    assert config.run.name == "sweep-abc123"
    assert (config.learner.optimizer.lr, config.train.group_size) == (5e-5, 4)

    started: list[dict[str, Any]] = []

    class Run:
        def define_metric(self, *_: object, **__: object) -> None:
            pass

    def init(**settings: Any) -> Run:
        started.append(settings)
        return Run()

    monkeypatch.setattr("wandb.init", init)
    wandb_run._start(config, tmp_path, 0)
    monkeypatch.delenv("WANDB_RUN_ID")
    wandb_run._start(config, tmp_path, 1)  # resumed by hand
    assert (
        [settings["id"] for settings in started] == ["abc123", "abc123"] == [(tmp_path / WANDB_ID_FILE).read_text()] * 2
    )

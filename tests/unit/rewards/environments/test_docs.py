"""What docs/environments.md shows works as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from qarl.config.io import load_config
from qarl.types import EnvironmentTurn, Prompt
from rewards.environments.service import EnvironmentService

PAGE = (Path(__file__).parents[4] / "docs" / "environments.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def test_every_config_is_one(tmp_path: Path) -> None:
    for number, text in enumerate(blocks("yaml")):
        file = tmp_path / f"{number}.yaml"
        file.write_text(text)
        kind = yaml.safe_load(text)["environment"]["kind"]
        assert load_config(file).environment.kind == kind


def test_the_environment_plays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sums.py").write_text(blocks("python")[0])
    config_file = tmp_path / "mine.yaml"
    config_file.write_text(blocks("yaml")[0])
    monkeypatch.chdir(tmp_path)
    with EnvironmentService(load_config(config_file).environment, pytest.fail) as service:
        assert service.reset(dict.fromkeys(range(2), Prompt("p", "3+4=", "7", (1,)))) == dict.fromkeys(
            range(2), EnvironmentTurn()
        )
        assert service.step({0: "5", 1: "5"}) == {0: EnvironmentTurn("2="), 1: EnvironmentTurn("2=")}
        assert service.step({0: "7", 1: "x"}) == {0: EnvironmentTurn(None, 1.0, True), 1: EnvironmentTurn("7=")}
        assert service.step({1: "8"}) == {1: EnvironmentTurn(None, 0.0, True)}

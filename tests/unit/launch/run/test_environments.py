"""A run's samples are conversations when its config has an environment, and plain responses when not."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest

from launch.run.environments import converse, start_rewards
from qarl.config.io import load_config
from qarl.types import Prompt, SampleRequest
from rewards.service import ProcessRewardService
from rollout.conversations import ConversingFleet
from tests.support.fakes import FakeEngine, FakeFleet

ROOT = Path(__file__).parents[4]


def test_without_an_environment_nothing_stands_between() -> None:
    config, fleet = load_config(ROOT / "configs" / "quickstart.yaml"), FakeFleet()
    with closing(start_rewards(config, pytest.fail, None)) as rewards:
        assert isinstance(rewards, ProcessRewardService)
        assert converse(config, fleet, rewards) is fleet


def test_games_are_played_and_judged(tmp_path: Path) -> None:
    """The engine answers each turn with up to four random digits."""
    config = load_config(ROOT / "configs" / "guess.yaml", [f"model.path={tmp_path / 'none'}"])
    engine = FakeEngine(0)
    with closing(start_rewards(config, pytest.fail, None)) as rewards:
        fleet = converse(config, FakeFleet([engine]), rewards)
        assert isinstance(fleet, ConversingFleet)
        asked = [SampleRequest(Prompt(f"p{i}", "12=", "12", (1, 5)), i, 1.0, 9) for i in range(30)]
        samples = fleet.sample(asked)
        scores = rewards.score(samples)
    assert {sample.prompt.text for sample in samples} == {"<bos>5="}
    assert {score.reward for score in scores} == {0.0, 1.0}
    assert not any(score.error for score in scores)
    assert max(len(sample.response_ids) - sample.num_sampled for sample in samples) == 6  # three times "9=" or "0="

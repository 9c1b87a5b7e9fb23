"""`qarl bench loop` around runs that log what real ones would."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from launch.cli import main
from launch.run.tracking import METRICS_FILE
from launch.tools.bench import loop
from qarl.config.io import load_config
from qarl.config.shipped import config_path


def test_a_row_for_each_mode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)

    def run(command: Sequence[str], log: Path) -> int:
        config = load_config(config_path(command[4]), command[5:])  # valid in every mode
        stale, idle = config.train.max_staleness, {"perf/workers_idle": 0.25, "perf/learner_idle": 0.5}
        of_stale = {"staleness/age_mean": float(stale), "staleness/ess": 0.5, "staleness/continued": 1.5}
        assert config.train.steps == config.eval.every == 6  # one to warm up, two that may sample nothing more
        steps = [
            {"timing_s/step": seconds, "training/rollouts": 8.0 * (i + 1), **idle, **(of_stale if stale else {})}
            for i, seconds in enumerate((9.0, 1.0, 1.0, 4.0, 0.1, 0.1))
        ]
        rows = [{"eval/pass@1": 0.1}, *steps, {"eval/pass@1": 0.75}]
        config.run.folder.mkdir(parents=True)
        (config.run.folder / METRICS_FILE).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return 0

    monkeypatch.setattr(loop, "run", run)
    assert main(["bench", "loop", "quickstart", "--steps", "3", "--overrides", "seed=1"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if "%" in line]
    assert rows == [
        "| in turn | 24 | 1800 | 2.00 | 25% | 50% | 0.00 | 1.00 | 0.00 | 0.750 |",
        "| one step off | 24 | 1800 | 2.00 | 25% | 50% | 1.00 | 0.50 | 1.50 | 0.750 |",
        "| staleness 4 | 24 | 1800 | 2.00 | 25% | 50% | 4.00 | 0.50 | 1.50 | 0.750 |",
        "| partial rollouts | 24 | 1800 | 2.00 | 25% | 50% | 4.00 | 0.50 | 1.50 | 0.750 |",
    ]


def test_every_mode_is_checked_before_the_first_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(loop, "run", lambda *_: pytest.fail("a run starts"))
    assert main(["bench", "loop", "quickstart", "--overrides", "learner.max_tokens_per_micro_batch=128"]) == 2
    assert "learner.max_tokens_per_micro_batch" in capsys.readouterr().err

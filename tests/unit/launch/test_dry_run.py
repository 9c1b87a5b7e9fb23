"""`qarl train --dry-run`."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.cli import main
from qarl.config.shipped import config_path

pytestmark = pytest.mark.usefixtures("as_from_a_shell")

LIGHT = ["rollout.num_cpus_per_worker=0.1", "learner.num_cpus_per_rank=0.1"]
"""So that the checks of the machine pass on any machine."""


def test_a_dry_run_shows_the_placement_and_writes_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    overrides = ["rollout.num_workers=2", "learner.num_ranks=1", "learner.num_threads=3", *LIGHT]
    assert main(["train", "quickstart", "cluster.device=cpu", "--dry-run", *overrides]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "run: runs/quickstart, from the beginning"
    assert [line for line in lines if line.startswith(("rollout worker", "learner rank"))] == [
        "rollout worker 0: 0.1 CPU",
        "rollout worker 1: 0.1 CPU",
        "learner rank 0: 0.1 CPU",
    ]
    assert any(line.startswith("machine: cpu, ") for line in lines)
    assert "learner: 1 rank x 3 threads, 2 rollout workers x 1 thread" in lines
    scheme = "scheme: w8a8_int8, engine kernels CPUInt8ScaledMMLinearKernel, learner"  # none for experts
    assert any(line.startswith(scheme) for line in lines)
    assert any(line.startswith("plan: ") for line in lines)
    assert list(tmp_path.iterdir()) == []


def test_of_a_complete_run_nothing_is_left(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "runs" / "quickstart"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(config_path("quickstart").read_text())
    monkeypatch.setattr("launch.run.folder.RunFolder._find_state", lambda folder: setattr(folder, "is_complete", True))
    assert main(["train", "quickstart", "cluster.device=cpu", "--dry-run", *LIGHT]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("runs/quickstart is complete; a larger `train.steps` continues it")


def test_rows_that_no_component_judges_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    components = "reward.components=[{kind: exact, sources: [quiz]}]"
    assert main(["train", "quickstart", "cluster.device=cpu", "--dry-run", components, *LIGHT]) == 2
    assert "reward.components: no component judges rows of data_source ''" in capsys.readouterr().err

"""`qarl chaos` on runs of a fake process tree: it injects, starts again, counts, and sees what is wrong."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from launch.tools.chaos import campaign, start
from launch.tools.chaos.campaign import Campaign, table
from launch.tools.chaos.faults import FAULTS

FAKE = Path(__file__).parents[4] / "support" / "fake_run.py"
KINDS = [kind for kind in FAULTS if kind != "worker hangs"]  # nobody there replaces it


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(campaign, "STARTING_S", 0.2)
    monkeypatch.setattr(campaign, "JITTER_S", 0.05)
    monkeypatch.setattr(start, "LEFT_AFTER_S", 0.5)


def campaign_of(folder: Path, faults: int, fault: str = "", kinds: Sequence[str] = KINDS) -> Campaign:
    """On fake runs; those that are disturbed have `fault`."""

    def command(run: Path) -> list[str]:
        is_disturbed = run.parents[1].name != "undisturbed"
        return [sys.executable, str(FAKE), str(run), *[fault] * is_disturbed]

    return Campaign(folder, command, faults, kinds=kinds)


def test_every_fault_is_survived_and_a_further_call_goes_on(tmp_path: Path) -> None:
    for total in (3, 8):
        chaos = campaign_of(tmp_path, total)
        lines = list(chaos.run())
        assert all(line.endswith(("right", "nobody disturbs this run")) for line in lines), "\n".join(lines)
    summary = chaos.summary()
    assert summary["all"] == {"injected": 8, "survived": 8, "lost": 0, "doubled": 0}
    assert summary["runs"] == summary["runs_right"] >= 2
    assert sum(summary["phases"].values()) == 8
    assert len({kind for kind, counts in summary["kinds"].items() if counts["injected"]}) > 2
    assert table(summary).splitlines()[-2] == "steps and prompts: 0 lost, 0 doubled"


@pytest.mark.parametrize(
    ("fault", "found"),
    [("doubles", "doubled step"), ("leaves", "left are"), ("differs", "other weights")],
)
def test_what_a_broken_run_does_is_seen(tmp_path: Path, fault: str, found: str) -> None:
    chaos = campaign_of(tmp_path, 1, fault, ["driver killed"])
    assert any(found in line for line in chaos.run())
    assert chaos.summary()["all"]["survived"] == 0


def test_a_run_that_does_not_resume_is_lost(tmp_path: Path) -> None:
    def command(run: Path) -> list[str]:
        program = FAKE if run.parents[1].name == "undisturbed" or not (run / "checkpoints").exists() else "nothing"
        return [sys.executable, str(program), str(run)]

    chaos = Campaign(tmp_path, command, 1, kinds=["driver killed"])
    assert "does not resume: code 2" in list(chaos.run())[-1]
    assert chaos.summary()["all"] == {"injected": 1, "survived": 0, "lost": 0, "doubled": 0}

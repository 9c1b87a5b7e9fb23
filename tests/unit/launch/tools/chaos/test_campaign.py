"""`qarl chaos` on runs of a fake process tree: it injects, starts again, counts, and sees what is wrong."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from launch.cli import main
from launch.run.resume import flatten
from launch.tools.chaos import campaign, faults, start
from launch.tools.chaos.campaign import Campaign, own_disk, table
from launch.tools.chaos.faults import FAULTS, Fault
from qarl.config.io import load_config
from qarl.errors import ConfigError, QarlError

FAKE = Path(__file__).parents[4] / "support" / "fake_run.py"
KINDS = [kind for kind in FAULTS if not kind.endswith("hangs")]  # nobody there waits for it


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(campaign, "STARTING_S", 0.2)
    monkeypatch.setattr(campaign, "JITTER_S", 0.05)
    monkeypatch.setattr(faults, "SLOW_S", 0.1)
    monkeypatch.setattr(faults, "FULL_S", 0.2)


def campaign_of(
    folder: Path, number: int, fault: str = "", kinds: Sequence[str] = KINDS, seed: int = 0, **settings: Any
) -> Campaign:
    """On fake runs; those that are disturbed have `fault`."""

    def command(run: Path) -> list[str]:
        is_disturbed = run.parents[1].name != "undisturbed"
        return [sys.executable, str(FAKE), str(run), *[fault] * is_disturbed]

    return Campaign(folder, command, settings, number, seed=seed, kinds=kinds)


def test_every_fault_is_survived_and_a_further_call_goes_on(tmp_path: Path) -> None:
    for total in (2, 5):
        chaos = campaign_of(tmp_path, total)
        lines = list(chaos.run())
        assert all(line.endswith(("right", "nobody disturbs this run")) for line in lines), "\n".join(lines)
    summary = chaos.summary()
    assert summary["all"] == {"injected": 5, "survived": 5, "lost": 0, "doubled": 0}
    assert summary["runs"] == summary["runs_right"] >= 2
    assert sum(summary["phases"].values()) == 5
    assert len({kind for kind, counts in summary["kinds"].items() if counts["injected"]}) > 1
    lines = table(summary).splitlines()
    for line, counts in zip(lines[1:], summary["kinds"].values(), strict=False):
        phases = ", ".join(f"{phase} {count}" for phase, count in sorted(counts["phases"].items()))
        assert sum(counts["phases"].values()) == counts["injected"]
        assert line.endswith(f"  {phases}" if phases else "0")
    assert lines[-3] == "steps, responses and draws: 0 lost, 0 doubled"


@pytest.mark.parametrize(
    ("fault", "found"),
    [("doubles", "doubled rows of step 000006 (1)"), ("leaves", "left are"), ("differs", "other weights")],
)
def test_what_a_broken_run_does_is_seen(
    tmp_path: Path, fault: str, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fault == "leaves":
        monkeypatch.setattr(start, "LEFT_AFTER_S", 0.1)
    chaos = campaign_of(tmp_path, 1, fault, ["driver killed"])
    assert any(found in line for line in chaos.run())
    assert chaos.summary()["all"]["survived"] == 0


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        ("loses", "lost responses that the pool was told (4)"),
        ("retells", "doubled responses that the pool was told (4)"),
        ("scores", "doubled results of prompts not in flight (1)"),
        ("skips", "lost responses of step 000006 (4)"),
        ("forgets", "lost draws of prompt c in flight after step 000006 (1)"),
        ("again", "doubled draws of prompt c in flight after step 000005 (1)"),
    ],
)
def test_what_is_lost_or_doubled_is_seen_where_no_bits_are_compared(tmp_path: Path, fault: str, found: str) -> None:
    chaos = campaign_of(tmp_path, 1, fault, ["driver killed"])
    chaos.is_exact = False
    last = list(chaos.run())[-1]
    assert found in last
    assert last.count("lost") + last.count("doubled") == {"forgets": 6, "again": 5}.get(fault, 1)  # one a checkpoint
    counts = chaos.summary()["all"]
    assert counts["survived"] == 0
    assert counts["lost" if found.startswith("lost") else "doubled"] >= 1


def test_what_only_the_pool_knows_is_compared_in_turn(tmp_path: Path) -> None:
    chaos = campaign_of(tmp_path, 1, "swaps", ["driver killed"])
    assert list(chaos.run())[-1] == "run-1: the whole run: other pool"


def test_a_run_that_does_not_resume_is_lost(tmp_path: Path) -> None:
    def command(run: Path) -> list[str]:
        program = FAKE if run.parents[1].name == "undisturbed" or not (run / "checkpoints").exists() else "nothing"
        return [sys.executable, str(program), str(run)]

    chaos = Campaign(tmp_path, command, {}, 1, kinds=["driver killed"])
    assert "does not resume: code 2" in list(chaos.run())[-1]
    assert chaos.summary()["all"] == {"injected": 1, "survived": 0, "lost": 0, "doubled": 0}
    assert table(chaos.summary()).endswith("in which nothing of this is counted: 1")


def test_a_death_that_a_run_goes_on_from_must_not_end_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAULTS, "worker killed", Fault(FAULTS["rank killed"].inject))  # which ends the fake run
    chaos = campaign_of(tmp_path, 1, kinds=["worker killed"])
    assert any(line.endswith("exit code 1") for line in chaos.run())
    assert chaos.summary()["all"]["survived"] == 0


def test_the_faults_of_a_run_that_was_cut_off_do_not_count(tmp_path: Path) -> None:
    chaos = campaign_of(tmp_path, 2, kinds=["driver killed"])
    for line in chaos.run():
        if "driver killed" in line:
            break  # as when the campaign is interrupted
    chaos = campaign_of(tmp_path, 1, kinds=["driver killed"])
    assert not chaos.outcomes
    lines = list(chaos.run())
    assert lines[1] == "run-1: cut off with the campaign, its faults do not count"
    assert lines[-1] == "run-2: the whole run: right"
    assert chaos.summary()["all"] == {"injected": 1, "survived": 1, "lost": 0, "doubled": 0}


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes").touch()
    for folder in (tmp_path, tmp_path / "notes"):
        with pytest.raises(ConfigError, match="something else"):
            campaign_of(folder, 1)


def test_other_settings_need_another_folder(tmp_path: Path) -> None:
    list(campaign_of(tmp_path, 1, kinds=["driver killed"], steps=6).run())
    before = (tmp_path / "settings.json").read_text()
    for change, told in (({"steps": 7}, "steps=6"), ({"steps": 6, "seed": 1}, "--seed=0"), ({}, "steps=6")):
        with pytest.raises(ConfigError, match=f"begun with other settings \\({told}\\)"):
            campaign_of(tmp_path, 2, **change)
    assert (tmp_path / "settings.json").read_text() == before
    (tmp_path / "settings.json").unlink()  # as of an earlier version
    with pytest.raises(ConfigError, match="settings are not known"):
        campaign_of(tmp_path, 2, steps=6)


def test_the_command_tells_its_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = flatten(load_config("configs/chaos.yaml").model_dump(mode="json"))
    Campaign(tmp_path, lambda _: [], settings, 1)
    assert main(["chaos", "chaos", "train.max_staleness=1", "--folder", str(tmp_path)]) == 2
    assert "was begun with other settings (train.max_staleness=0); use" in capsys.readouterr().err


def test_a_run_that_waits_for_its_own_timeout_does_not_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(campaign, "PATIENCE_S", 0.0)
    settings = {"learner.timeout_s": 90.0, "reward.timeout_s": 5.0}
    assert list(campaign_of(tmp_path / "a", 1, kinds=["driver killed"], **settings).run())[-1].endswith("right")
    with pytest.raises(QarlError, match="undisturbed: hangs"):
        list(campaign_of(tmp_path / "b", 1).run())


def test_a_disk_that_is_still_used_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = [subprocess.CompletedProcess([], 0), subprocess.CompletedProcess([], 32, stderr="umount: target is busy.")]
    monkeypatch.setattr(subprocess, "run", Mock(side_effect=ended))
    with pytest.raises(QarlError, match="cannot be unmounted: umount: target is busy"), own_disk(tmp_path, 1):
        pass

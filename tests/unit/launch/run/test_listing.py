import json
import os
import re
import time
from pathlib import Path
from typing import Any

import pytest

from launch.cli import main
from launch.run.files import is_locked, only_writer


def make(folder: Path, steps: int, rows: list[dict[str, Any]], age_s: float) -> None:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(f"train: {{steps: {steps}}}\nof_old: 1\n")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for file in folder.iterdir():
        os.utime(file, (time.time() - age_s,) * 2)


def test_runs_are_listed_with_their_state(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"step": 0, "eval/pass@1": 0.25}, {"step": 3}, {"step": 4, "eval/pass@1": 0.5}]
    make(tmp_path / "old", 4, rows, 7200)
    (tmp_path / "old" / "summary.json").write_text("{}")
    make(tmp_path / "studies" / "bands" / "arm", 9, [], 60)
    make(tmp_path / "busy", 8, rows[:2], 5)
    make(tmp_path / ".old.replaced-1", 4, rows, 1)
    (tmp_path / "models").mkdir()
    with only_writer(tmp_path / "busy", print):
        assert main(["runs", str(tmp_path), "--json"]) == 0
        assert is_locked(tmp_path / "busy")
    assert not is_locked(tmp_path / "busy")
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    shown = [(run["name"], run["state"], run["step"], run["steps"], run["accuracy"]) for run in found]
    assert shown == [
        ("busy", "running", 3, 8, 0.25),
        ("studies/bands/arm", "stopped", 0, 9, None),
        ("old", "done", 4, 4, 0.5),
    ]
    assert 7200 <= found[2]["age_s"] < 7300
    assert main(["runs", str(tmp_path)]) == 0
    table = capsys.readouterr().out
    assert "studies/bands/arm" in table
    assert "4/4" in table
    assert "2:00:0" in table


def test_a_run_with_more_steps_than_its_summary_is_not_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "longer", 9, [{"step": 4}, {"step": 5}], 60)
    (tmp_path / "longer" / "summary.json").write_text('{"steps": 4}')
    assert main(["runs", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["state"] == "stopped"


def test_a_run_itself_is_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "mine", 9, [{"step": 4}], 60)
    assert main(["runs", str(tmp_path / "mine"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["name"] == "mine"


def test_no_name_is_wrapped_without_a_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    name = "a-sweep-of-many-settings/lr_1e-4-group_size_8-seq_clip_ratio_low_0.03-seed0"
    make(tmp_path / name, 9, [{"step": 4}], 60)
    assert main(["runs", str(tmp_path)]) == 0
    assert name in capsys.readouterr().out


def test_a_folder_without_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "no runs\n"
    assert main(["runs", str(tmp_path / "nowhere")]) == 2
    assert "nowhere: is no folder; name the folder that holds the runs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("metrics.jsonl", '{"step": 1, "eval\n'),
        ("metrics.jsonl", '{"step": 1, "eval/pass@1": "high"}\n'),
        ("config.yaml", "train: {steps: ["),
    ],
)
def test_a_damaged_run_hides_no_other(tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, text: str) -> None:
    for name in ("good", "bad"):
        make(tmp_path / name, 4, [{"step": 3}], 60)
    (tmp_path / "bad" / file).write_text(text)
    assert main(["runs", str(tmp_path), "--json"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {(run["name"], run["state"], run["step"]) for run in found} == {
        ("good", "stopped", 3),
        ("bad", "damaged", 0),
    }
    assert main(["runs", str(tmp_path)]) == 0
    assert re.search(r"bad +damaged +- +- ", capsys.readouterr().out)

import json
import re
from pathlib import Path

import numpy as np
import pytest

from launch.cli import main
from launch.run.preview import _history
from launch.run.tracking import METRICS_FILE, RunTracker
from qarl.config.io import to_yaml, validate
from qarl.errors import DataError
from qarl.types import Prompt, Sample, Score
from tests.support.browser import look
from tests.support.pages import ROOT
from tests.support.records import row_of

TREE = {"model": {"path": "m"}, "task": {"kind": "sorting"}, "tracking": {"wandb_mode": "offline"}}
CONFIG = validate(TREE, "test")
SCRIPT = """
const parts = [...document.querySelectorAll("#charts > *")];
const texts = (one, selector) => [...one.querySelectorAll(selector)].map((text) => text.textContent);
found.order = parts.map((one) => one.matches("figure") ? one.querySelector("h3").textContent : `# ${one.textContent}`);
found.drawn = Object.fromEntries(parts.map((one, i) => [found.order[i], texts(one, "figcaption, svg text, td")]));
found.curve = parts[found.order.lastIndexOf("reward/mean")].querySelector('path[stroke="#0072b2"][fill="none"]')
  .getAttribute("d").match(/-?[0-9.]+/g).map(Number);
found.head = texts(document, ".run p, .run td, .run th");
found.wide = document.documentElement.scrollWidth > innerWidth;
"""


@pytest.fixture
def run_dir(tmp_path: Path, offline_wandb: None) -> Path:
    """A run whose W&B file lacks a metric that it logged elsewhere."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(to_yaml(CONFIG))
    tracker = RunTracker(CONFIG, folder, 0, 4)
    sample = Sample(Prompt("p", "21=", "12", (1, 2)), (3,), np.array([-1.0], np.float32), "<12>", "stop", version=7)
    for step, reward in enumerate((0.25, 0.5, 1.0, 0.5), start=1):
        errors = {f"mismatch/{part}logp_abs_max": reward / 10 for part in ("", "q1_", "q2_")}
        tracker.log(step, {"reward/mean": reward, "actor/lr": 1e-5, "mine/own": 2.0, **errors})
        if step > 2:
            tracker.table(step, "samples", [row_of(sample, Score(reward))])
    tracker.close()
    with (folder / METRICS_FILE).open("a") as file:
        file.write(json.dumps({"step": 4, "eval/pass@1": 0.5}) + "\n")
    return folder


def test_the_panels_of_a_workspace_are_drawn_from_the_file_of_wandb(run_dir: Path, tmp_path: Path) -> None:
    page = tmp_path / "workspace.html"
    assert main(["dashboard", str(run_dir), "--preview", str(page)]) == 0
    found = look(page, SCRIPT)
    assert found["errors"] == []
    compared = ["# compare runs", "reward/mean", "mismatch/logp_abs_max", "RunComparer"]
    reward = ["# reward", "reward/mean", "MarkdownPanel", "# eval", "MarkdownPanel", "# objective", "actor/lr"]
    others = ["MarkdownPanel", "# mismatch", "mismatch/*logp_abs_max", "MarkdownPanel", "# other", "mine/own"]
    assert found["order"] == [*compared, *reward, *others, "# samples", "samples"]
    drawn = found["drawn"]["mismatch/*logp_abs_max"]
    assert drawn[0] == "x: step"
    assert {"nats", *(f"mismatch/{part}logp_abs_max" for part in ("", "q1_", "q2_"))} <= set(drawn)
    a, b, c, d = found["curve"][1::2]
    assert ((b - c) / (a - b), (d - c) / (a - b)) == pytest.approx((2.0, 2.0), abs=0.02)  # y grows downwards
    assert found["drawn"]["samples"][:3] == ["step", "prompt", "response"]
    assert [found["drawn"]["samples"].count(text) for text in ("3", "4", "<12>")] == [1, 1, 2]  # one row for each step
    assert "largest |d log p| of a step" in " ".join(found["drawn"]["MarkdownPanel"])
    assert found["head"][0].endswith("panels; 2 of them have no data in this run's W&B files")
    assert found["head"].count("eval/pass@1") == 2  # of the sections "compare runs" and "eval"
    assert not found["wide"]


def rows_of(step: int) -> list[dict[str, float]]:
    return [{"reward/mean": step / 8}, {"eval/greedy": step / 16}]


def test_the_folders_of_a_resumed_run_are_together_the_run(tmp_path: Path, offline_wandb: None) -> None:
    """It was interrupted after step 4, and continues after step 2: of its rows only the last may not have arrived."""
    for start, last in ((0, 4), (2, 5)):
        tracker = RunTracker(CONFIG, tmp_path, start, 5)
        for step in range(start + 1, last + 1):
            for row in rows_of(step):
                tracker.log(step, row)
        tracker.close()
    pages = (ROOT / "docs" / "tracking.md").read_text() + (ROOT / "README.md").read_text()
    (synced,) = set(re.findall(r"wandb sync runs/\w+/([^`\s]+)", pages))
    files = sorted(tmp_path.glob(f"{synced}/run-*.wandb"))
    assert files == sorted(tmp_path.rglob("offline-run-*/*.wandb"))
    assert len(files) == 2
    rows = [{key: row[key] for key in row if key[0] != "_"} for row in _history(tmp_path)]
    every = [{"step": step, **row} for step in range(1, 6) for row in rows_of(step)]
    assert rows == every[:8] + every[7:]


def test_a_file_that_wandb_cannot_read_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "wandb" / "run-1" / "run-1.wandb"
    file.parent.mkdir(parents=True)
    file.write_text("nonsense")
    with pytest.raises(DataError, match=r"run-1\.wandb: W&B cannot read it: \w[^\n]*$"):
        list(_history(tmp_path))


@pytest.mark.usefixtures("as_from_a_shell")
def test_a_run_without_files_of_wandb_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    Path(METRICS_FILE).write_text('{"step": 1, "reward/mean": 0.5}\n')
    Path("config.yaml").write_text(to_yaml(CONFIG))
    assert main(["dashboard", ".", "--preview", "page.html"]) == 2
    assert "no W&B files; tracking.trackers needs wandb, not disabled" in capsys.readouterr().err
    assert main(["dashboard", "."]) == 2
    assert "--entity: is required" in capsys.readouterr().err
    assert not Path("page.html").exists()

import io
import json
import math
from pathlib import Path

import pytest
from rich.console import Console

from launch.cli import main
from launch.run.comparison import ComparedRun, compare, differing, render_comparison


def make_run(folder: Path, config: str, *rows: dict[str, float]) -> Path:
    folder.mkdir()
    (folder / "config.yaml").write_text(config)
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return folder


def drawn(runs: list[ComparedRun], width: int) -> list[list[str]]:
    """The words of every line."""
    console = Console(file=io.StringIO(), width=width)
    console.print(render_comparison(runs, width))
    return [line.split() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]


def test_figures_are_the_last_and_the_worst(tmp_path: Path) -> None:
    steps = [
        {"step": step, "reward/mean": step / 20, "timing_s/step": 1.0 + step, "mismatch/logp_abs_max": float(step == 3)}
        for step in range(1, 14)
    ]
    evals = [{"step": 0, "eval/pass@1": 0.1}, {"step": 13, "eval/pass@1": 0.9, "eval/num_prompts": 50}]
    [run, bare] = compare(
        [
            make_run(tmp_path / "a", "seed: 1\n", *steps, *evals),
            make_run(tmp_path / "b", "seed: 2\n", {"step": 1, "eval/pass@1": 0.5, "mismatch/logp_abs_max": 0.0}),
        ]
    )
    assert run.figures == {
        "steps": "13, not ended",
        "held-out pass@1, last": "0.900 (0.786 to 0.957)",  # Wilson's, see test_build.py
        "reward, last 10 steps": "0.425",  # of steps 4 to 13
        "largest |d log p|, all steps": "1.00e+00",
        "seconds of a step, median": "8",
    }
    assert bare.figures["held-out pass@1, last"] == "0.500"  # of how many prompts is not known
    assert bare.figures["largest |d log p|, all steps"] == "exactly 0"


def test_a_gap_that_is_no_number_is_never_called_zero(tmp_path: Path) -> None:
    steps = [{"step": step, "mismatch/logp_abs_max": gap} for step, gap in enumerate((0.0, math.nan, 0.0), 1)]
    [run] = compare([make_run(tmp_path / "a", "seed: 1\n", *steps)])
    assert run.figures["largest |d log p|, all steps"] == "nan"


def test_only_settings_that_differ_are_shown() -> None:
    trees = [
        {"seed": 1, "run": {"name": "a"}, "train": {"steps": 4, "lr": 0.1}, "build": {"layers": 3, "width": 64}},
        {"seed": 1, "run": {"name": "b"}, "train": {"steps": 8, "lr": 0.1, "more": "x" * 99}, "build": None},
    ]
    assert differing(trees) == {
        "train.steps": ["4", "8"],
        "train.more": ["-", "x" * 57 + "..."],
        "build": ["2 settings", "None"],
    }


def test_more_runs_than_fit_have_tables_below_each_other() -> None:
    runs = [ComparedRun(f"run[{i}]", {"steps": str(i)}, {"seed": i}) for i in range(3)]
    lines = drawn(runs, 80)
    names = [["run[0]", "run[1]"], ["run[2]"]]
    assert [line for line in lines if line and line[0].startswith("run")] == names
    assert [line for line in lines if "seed" in line] == [["seed", "0", "1"], ["seed", "2"]]
    assert [line for line in drawn(runs, 120) if "steps" in line] == [["steps", "0", "1", "2"]]
    assert ["No", "setting", "differs."] in drawn(runs[:1] * 2, 80)


def test_the_command_writes_the_page_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"step": 1, "reward/mean": 0.5}
    folders = [str(make_run(tmp_path / name, "seed: 1\n", row)) for name in ("a", "b")]
    assert main(["compare", *folders]) == 0
    said = capsys.readouterr().out
    assert "reward, last 10 steps" in said
    assert said.splitlines()[-1] == str(tmp_path / "comparison.html")
    assert "<title>a and b</title>" in (tmp_path / "comparison.html").read_text()

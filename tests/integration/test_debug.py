"""Functions of the user's own and the switches of `debug`, with the real learner and engine.

One run has the objective, reward and tracker of docs/hooks.md and saves its batches; the others train on these batches,
which needs no engine.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from launch.run.tracking import read_log
from tests.support.small_run import ROOT, train

EARNS = """
documented = share_right

def share_right(text, finish_reason, answer, bonus):  # a random model earns nothing else
    return (documented(text, finish_reason, answer, bonus) + len(set(text)) % 3) / 3
"""
FAULTY = """
import os
from qarl.errors import ObjectiveError

def faulty(inputs):
    return divide(inputs) if "RANK" in os.environ else (inputs.logp_BT.sum(), {})

def divide(inputs):
    try:
        return 1 / 0
    except ZeroDivisionError as error:
        raise ObjectiveError("cannot divide") from error
"""
RATE = ("learner.optimizer.lr=0.01", "learner.optimizer.warmup_steps=0")
SAVED = "debug.train_from=runs/mine/batches"


def section() -> str:
    [found] = re.findall("```yaml\n(.*?)```", (ROOT / "docs" / "hooks.md").read_text(), re.DOTALL)
    return str(found).replace("inherits: quickstart\n", "")  # `train` has its own


@pytest.fixture(scope="module")
def folder(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Outside of the repository; it holds the run."""
    made = tmp_path_factory.mktemp("outside")
    code = re.findall("```python\n(.*?)```", (ROOT / "docs" / "hooks.md").read_text(), re.DOTALL)
    (made / "mine.py").write_text("\n\n".join([*code, EARNS]))
    debug = "debug: {save_batches: true, profile_steps: [2, 2]}\n"
    done = train(made, tiny_models["qwen3"], section() + debug, *RATE)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return made


def test_a_run_with_functions_of_its_own(folder: Path) -> None:
    run = folder / "runs" / "mine"
    rows = {row["step"]: row for row in read_log(run / "metrics.jsonl") if "reward/mean" in row}
    assert sorted(rows) == [1, 2]
    assert "mine/ratio_max" in rows[1] or "mine/ratio_max" in rows[2]
    written = [line.split(",") for line in (run / "rewards.csv").read_text().splitlines()]
    assert [(int(step), float(reward)) for step, reward in written] == [
        (step, row["reward/mean"]) for step, row in rows.items()
    ]
    assert not list(run.glob("wandb*"))


def test_saved_batches_train_to_the_same_weights_without_an_engine(tiny_models: dict[str, Path], folder: Path) -> None:
    again = train(folder, tiny_models["qwen3"], section(), *RATE, SAVED, "run.name=again")
    assert again.returncode == 0, again.stdout[-3000:] + again.stderr[-3000:]
    assert re.search(r"step 2/2  loss -?\d\.\d{3}  .* tokens/s", again.stdout)
    assert "runs/again/final" in again.stdout.partition("Files")[2]  # the summary

    ours, theirs, start = (
        load_file(path / "model.safetensors")
        for path in (folder / "runs/again/final", folder / "runs/mine/final", tiny_models["qwen3"])
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert any(not torch.equal(theirs[name], start[name]) for name in start)
    old, new = (_updates(folder / "runs" / name / "metrics.jsonl") for name in ("mine", "again"))
    assert sorted(new) == [1, 2]
    assert all(value == old[step][name] for step, row in new.items() for name, value in row.items())
    assert not (folder / "runs/again/logs/worker-0.log").exists()


def test_a_profile_shows_the_work_of_each_process(folder: Path) -> None:
    for process, op in (("rank-0", "Backward"), ("worker-0", "int8")):
        trace = json.loads((folder / f"runs/mine/profile/{process}.json").read_text())
        names = {event.get("name", "") for event in trace["traceEvents"]}
        assert any(op in name for name in names), sorted(names)[:50]


@pytest.mark.slow
def test_an_error_in_an_actor_is_one_line_and_its_whole_traceback_in_the_log(
    tiny_models: dict[str, Path], folder: Path
) -> None:
    """With QARL_TRACEBACK=1 the driver prints the same traceback: tests/unit/qarl/test_remote.py."""
    (folder / "faulty.py").write_text(FAULTY)
    faulty = 'objective: {kind: custom, function: "faulty.py:faulty"}\nrun: {name: faulty}\n'
    done = train(folder, tiny_models["qwen3"], faulty, SAVED)
    assert done.returncode == 1, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stderr == "qarl: step 1: cannot divide\n"
    logs = folder / "runs" / "faulty" / "logs"
    text = (logs / "driver.log").read_text()
    assert "faulty.py" in text
    assert "ZeroDivisionError: division by zero" in text
    assert "ObjectiveError: step 1: cannot divide" in text
    assert "INFO trainer.learner: learns from" in (logs / "rank-0.log").read_text()


def _updates(file: Path) -> dict[int, dict[str, Any]]:
    """The learner's metrics by step."""
    rows = {row["step"]: row for row in read_log(file) if "actor/lr" in row}
    return {step: {name: row[name] for name in row if name.startswith("actor/")} for step, row in rows.items()}

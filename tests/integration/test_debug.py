"""The switches of `debug` with the real learner and engine."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from launch.run.tracking import read_log
from tests.support.small_run import train


def test_saved_batches_train_to_the_same_weights_without_an_engine(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text("def judge(text, finish_reason, answer):\n    return len(set(text)) % 3 / 2\n")
    reward = 'reward: {kind: custom, function: "mine.py:judge"}\n'  # a random model earns nothing else
    settings = ("learner.optimizer.lr=0.01", "learner.optimizer.warmup_steps=0")
    debug = "run: {name: saved}\ndebug: {save_batches: true, profile_steps: [2, 2]}\n"
    first = train(tmp_path, tiny_models["qwen3"], reward + debug, *settings)
    assert first.returncode == 0, first.stdout[-3000:] + first.stderr[-3000:]
    debug = "run: {name: again}\ndebug: {train_from: runs/saved/batches}\n"
    again = train(tmp_path, tiny_models["qwen3"], reward + debug, *settings)
    assert again.returncode == 0, again.stdout[-3000:] + again.stderr[-3000:]
    assert re.search(r"step 2/2  loss -?\d\.\d{3}  .* tokens/s", again.stdout)
    assert "runs/again/final" in again.stdout.partition("Files")[2]  # the summary

    ours, theirs, start = (
        load_file(folder / "model.safetensors")
        for folder in (tmp_path / "runs/again/final", tmp_path / "runs/saved/final", tiny_models["qwen3"])
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert any(not torch.equal(theirs[name], start[name]) for name in start)
    old, new = (_updates(tmp_path / "runs" / name / "metrics.jsonl") for name in ("saved", "again"))
    assert sorted(new) == [1, 2]
    assert all(value == old[step][name] for step, row in new.items() for name, value in row.items())
    assert not (tmp_path / "runs/again/logs/worker-0.log").exists()

    for process, op in (("rank-0", "Backward"), ("worker-0", "int8")):
        trace = json.loads((tmp_path / f"runs/saved/profile/{process}.json").read_text())
        names = {event.get("name", "") for event in trace["traceEvents"]}
        assert any(op in name for name in names), sorted(names)[:50]


def _updates(file: Path) -> dict[int, dict[str, Any]]:
    """The learner's metrics by step."""
    rows = {row["step"]: row for row in read_log(file) if "actor/lr" in row}
    return {step: {name: row[name] for name in row if name.startswith("actor/")} for step, row in rows.items()}

"""A folder outside of the repository with an objective, a reward and a tracker of its own: those of docs/hooks.md."""

from __future__ import annotations

import re
from pathlib import Path

from launch.run.tracking import read_log
from tests.support.small_run import ROOT, train


def test_a_run_with_functions_of_its_own(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    text = (ROOT / "docs" / "hooks.md").read_text()
    (tmp_path / "mine.py").write_text("\n\n".join(re.findall("```python\n(.*?)```", text, re.DOTALL)))
    [section] = re.findall("```yaml\n(.*?)```", text, re.DOTALL)
    done = train(tmp_path, tiny_models["qwen3"], section.replace("inherits: quickstart\n", ""))  # `train` has its own
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    run = tmp_path / "runs" / "mine"
    rows = {row["step"]: row for row in read_log(run / "metrics.jsonl") if "reward/mean" in row}
    assert sorted(rows) == [1, 2]
    assert "mine/ratio_max" in rows[1] or "mine/ratio_max" in rows[2]
    written = [line.split(",") for line in (run / "rewards.csv").read_text().splitlines()]
    assert [(int(step), float(reward)) for step, reward in written] == [
        (step, row["reward/mean"]) for step, row in rows.items()
    ]
    assert not list(run.glob("wandb*"))


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


def test_an_error_in_an_actor_is_one_line_or_its_whole_traceback(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "faulty.py").write_text(FAULTY)
    section = 'objective: {kind: custom, function: "faulty.py:faulty"}\nrun: {name: faulty, resume: false}\n'
    done = train(tmp_path, tiny_models["qwen3"], section)
    assert done.returncode == 1, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stderr == "qarl: step 1: cannot divide\n"
    traced = train(tmp_path, tiny_models["qwen3"], section, QARL_TRACEBACK="1")
    assert traced.returncode == 1
    logs = tmp_path / "runs" / "faulty" / "logs"
    for text in (traced.stderr, (logs / "driver.log").read_text()):
        assert "faulty.py" in text
        assert "ZeroDivisionError: division by zero" in text
        assert "ObjectiveError: step 1: cannot divide" in text
    assert "INFO trainer.learner: learns from" in (logs / "rank-0.log").read_text()

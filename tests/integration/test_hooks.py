"""A folder outside of the repository with an objective, a reward and a tracker of its own: those of docs/hooks.md."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from launch.run.tracking import read_log

ROOT = Path(__file__).parents[2]
SMALL = """
task: {num_prompts: 16, levels: [2, 3]}
train: {steps: 2, prompts_per_step: 4, group_size: 4, checkpoint_every: 2}
learner: {minibatches: 1}
advantage: {drop_zero_variance: false}
eval: {num_prompts: 4, num_samples: 1, final_num_prompts: 4, greedy: false}
controls: {teacher: false, sft_continued: false}
"""


def test_a_run_with_functions_of_its_own(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    text = (ROOT / "docs" / "hooks.md").read_text()
    (tmp_path / "mine.py").write_text("\n\n".join(re.findall("```python\n(.*?)```", text, re.DOTALL)))
    [section] = re.findall("```yaml\n(.*?)```", text, re.DOTALL)
    model = f"model: {{path: {tiny_models['qwen3']}, build: null}}\n"
    (tmp_path / "mine.yaml").write_text(f"inherits: {ROOT}/configs/quickstart.yaml\n{model}{SMALL}{section}")
    command = [sys.executable, "-c", "import sys; from launch.cli import main; sys.exit(main())", "train", "mine.yaml"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    run = tmp_path / "runs" / "quickstart"
    rows = {row["step"]: row for row in read_log(run / "metrics.jsonl") if "reward/mean" in row}
    assert sorted(rows) == [1, 2]
    assert "mine/ratio_max" in rows[1] or "mine/ratio_max" in rows[2]
    written = [line.split(",") for line in (run / "rewards.csv").read_text().splitlines()]
    assert [(int(step), float(reward)) for step, reward in written] == [
        (step, row["reward/mean"]) for step, row in rows.items()
    ]
    assert not list(run.glob("wandb*"))

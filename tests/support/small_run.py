"""`qarl train` in a process of its own: the quickstart, small, on a random model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PYTHONPATH = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
"""Of processes that a test starts."""
SMALL = """
task: {num_prompts: 16, levels: [2, 3]}
train: {steps: 2, prompts_per_step: 4, group_size: 4, checkpoint_every: 2}
learner: {minibatches: 1}
advantage: {drop_zero_variance: false}
eval: {num_prompts: 4, num_samples: 1, final_num_prompts: 4, greedy: false}
controls: {teacher: false, sft_continued: false}
"""


def train(folder: Path, model: Path, section: str, *overrides: str) -> subprocess.CompletedProcess[str]:
    """`qarl train` in `folder`: the quickstart, small, with `section` added to its config, and overrides."""
    start = f"inherits: {ROOT}/configs/quickstart.yaml\nmodel: {{path: {model}, build: null}}\n"
    (folder / "mine.yaml").write_text(start + SMALL + section)
    command = [sys.executable, "-c", "import sys; from launch.cli import main; sys.exit(main())", "train"]
    env = os.environ | {"PYTHONPATH": PYTHONPATH}
    return subprocess.run(
        [*command, "mine.yaml", *overrides], cwd=folder, env=env, capture_output=True, text=True, timeout=300
    )

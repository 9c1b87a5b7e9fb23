"""The whole system in one process, as the README shows it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.support.small_run import PYTHONPATH


def test_a_mistyped_key_is_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "launch.demo.minimal", "train.stepz=2"]
    env = os.environ | {"PYTHONPATH": PYTHONPATH}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "did you mean 'train.steps'?" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_two_steps_in_one_process(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "launch.demo.minimal", "train.steps=2", "train.prompts_per_step=4"]
    command += [f"model.path={tiny_models['qwen3']}", "model.build=null", "task.num_prompts=16", "task.levels=[2,3]"]
    env = os.environ | {"PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "2"}  # it must set its own
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("step ")]
    assert len(lines) == 2, done.stdout[-3000:]
    for step, line in enumerate(lines, start=1):
        assert re.fullmatch(rf"step {step}/2  reward \d\.\d{{3}}  max \|d log p\| 0", line)

"""`qarl chaos` on a real run: a few faults. The long campaign runs by name (CONTRIBUTING.md)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
KINDS = ("worker killed", "verifier killed", "driver killed")


def test_a_run_survives_a_few_faults(tmp_path: Path) -> None:
    own = ["train.steps=10", f"model.path={tmp_path}/model", "--folder", str(tmp_path / "chaos"), "--faults", "3"]
    command = [sys.executable, "-m", "launch.cli", "chaos", "chaos", *own, "--kinds", *KINDS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    counts = json.loads(done.stdout.splitlines()[-1])["all"]
    assert counts == {"injected": 3, "survived": 3, "lost": 0, "doubled": 0}

"""`qarl chaos` on a real run: a few faults. The long campaign runs by name (CONTRIBUTING.md)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qarl.errors import AGAIN
from tests.support.small_run import PYTHONPATH

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
A_DEAD_RAYLET = """
import psutil, time
from launch.cluster.connect import connect
from qarl.config.io import validate
from qarl.errors import QarlError
import ray

connect(validate({"model": {"path": "m"}, "task": {"kind": "sorting"}}, "test"))
(raylet,) = (p for p in psutil.Process().children(recursive=True) if p.name() == "raylet")
raylet.kill()
try:
    time.sleep(60)
except QarlError as error:
    print(error)
ray.shutdown()
print("shut down")
"""


@pytest.mark.parametrize(
    ("max_staleness", "kinds"), [(0, ("worker killed", "verifier killed", "driver killed")), (1, ("driver killed",))]
)
def test_a_run_survives_a_few_faults(tmp_path: Path, max_staleness: int, kinds: tuple[str, ...]) -> None:
    """In turn with the bits of an undisturbed run; one step off with every step and prompt once, none too old."""
    own = ["train.steps=10", f"train.max_staleness={max_staleness}", f"model.path={tmp_path}/model"]
    own += ["--folder", str(tmp_path / "chaos"), "--faults", "3"]
    command = [sys.executable, "-m", "launch.cli", "chaos", "chaos", *own, "--kinds", *kinds]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    counts = json.loads(done.stdout.splitlines()[-1])["all"]
    assert counts == {"injected": 3, "survived": 3, "lost": 0, "doubled": 0}
    for metrics in tmp_path.glob("chaos/run-*/runs/chaos/metrics.jsonl"):
        rows = [json.loads(line) for line in metrics.read_text().splitlines()]
        ages = [row["staleness/age_max"] for row in rows if "staleness/age_max" in row]
        assert len(ages) == (10 if max_staleness else 0)
        assert all(age <= max_staleness for age in ages)
        assert all(row.get("mismatch/logp_abs_max", 0.0) == 0.0 for row in rows)


def test_the_end_of_a_raylet_is_one_error() -> None:
    """Ray's next put would end the process without a word."""
    env = os.environ | {"PYTHONPATH": PYTHONPATH, "RAY_AUTH_MODE": "disabled"}
    done = subprocess.run([sys.executable, "-c", A_DEAD_RAYLET], env=env, capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith(f"Ray's raylet has died; {AGAIN}\n"), done.stdout + done.stderr
    assert done.stdout.endswith("shut down\n")  # Ray prints, too; a run puts that into its log
    assert done.returncode == 0

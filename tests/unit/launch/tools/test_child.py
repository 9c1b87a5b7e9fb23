"""Child processes of the tools end with their parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.tools.child import child

ROOT = Path(__file__).parents[4]
CODE = """
import os, time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from launch.tools.child import end_with_parent

if __name__ == "__main__":
    with ProcessPoolExecutor(1, get_context("spawn"), end_with_parent) as process:
        print(process.submit(os.getpid).result(), flush=True)
        process.submit(time.sleep, 60).result()
"""


def test_a_child_ends_with_its_parent(tmp_path: Path) -> None:
    (tmp_path / "parent.py").write_text(CODE)
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, tmp_path / "parent.py"], stdout=subprocess.PIPE, text=True, env=env
    ) as parent:
        assert parent.stdout is not None
        number = int(parent.stdout.readline())
        parent.send_signal(signal.SIGKILL)
    for _ in range(100):
        state = Path(f"/proc/{number}/stat")
        if not state.exists() or state.read_text().split()[2] == "Z":
            return
        time.sleep(0.1)
    os.kill(number, signal.SIGKILL)
    raise AssertionError("the child goes on")


def test_an_interrupted_tool_ends_its_child(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), child(["sleep", "60"], tmp_path / "log") as process:
        raise KeyboardInterrupt
    assert process.returncode == -signal.SIGTERM

"""Child processes of the tools end with their parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest

from launch.tools.child import child, own_process

ROOT = Path(__file__).parents[4]
CODE = """
import os, time
from launch.tools.child import own_process

if __name__ == "__main__":
    with own_process() as call:
        print(call(os.getpid), flush=True)
        call(time.sleep, 60)
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


@pytest.mark.parametrize(
    ("end", "argument", "told"),
    [(os._exit, 3, "exited with code 3"), (signal.raise_signal, 9, "was killed by SIGKILL")],
)
def test_a_call_tells_how_its_process_ended(end: Callable[[int], None], argument: int, told: str) -> None:
    with own_process() as call:
        assert call(divmod, 7, 2) == (3, 1)
        with pytest.raises(ZeroDivisionError):
            call(divmod, 7, 0)
        with pytest.raises(BrokenProcessPool, match=f"its process {told}"):
            call(end, argument)


def test_an_interrupted_tool_ends_its_child(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), child(["sleep", "60"], tmp_path / "log") as process:
        raise KeyboardInterrupt
    assert process.returncode == -signal.SIGTERM

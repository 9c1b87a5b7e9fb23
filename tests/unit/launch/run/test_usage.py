import subprocess
import sys
from pathlib import Path

from launch.run.usage import usage


def test_processes_are_counted_by_their_role(tmp_path: Path) -> None:
    """A child that is called as Ray calls a rollout worker, and one of any other name."""
    code = "import time; x = b'x' * 2**26; print('ready', flush=True); time.sleep(60)"
    children = [
        subprocess.Popen([name, "-c", code], executable=sys.executable, stdout=subprocess.PIPE)
        for name in ("ray::RolloutWorker.generate", "verifier")
    ]
    try:
        for child in children:
            assert child.stdout
            child.stdout.readline()
        found = usage(tmp_path)
    finally:
        for child in children:
            child.kill()
            child.communicate()
    assert 0.05 < found["memory/workers"] < 0.5
    assert found["memory/others"] > 0.05
    assert found["memory/driver"] > 0.01
    assert found["system/memory_free"] > 0
    assert found["system/disk_free"] > 0

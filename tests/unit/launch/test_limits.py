"""Cores and memory that containers and batch jobs leave to a process."""

from pathlib import Path

import psutil
import pytest

from launch import limits

HUGE = "9223372036854771712"


@pytest.mark.parametrize(
    ("groups", "files", "cores", "memory"),
    [
        ("0::/", {"cpu.max": "250000 100000", "memory.max": "1000"}, 2, 1000),
        ("0::/", {"cpu.max": "max 100000", "memory.max": "max"}, 64, None),
        ("0::/", {"cpu.max": "50000 100000"}, 1, None),
        ("0::/", {}, 64, None),
        # of a batch job the limits may lie above the group of the process
        ("0::/job/step", {"job/cpu.max": "400000 100000", "job/step/cpu.max": "max 100000", "memory.max": "9"}, 4, 9),
        # the path of a container's group may be the host's
        ("0::/host/docker/1", {"cpu.max": "300000 100000", "memory.max": "7"}, 3, 7),
        ("2:cpu,cpuacct:/a", {"cpu/a/cpu.cfs_quota_us": "800000", "cpu/a/cpu.cfs_period_us": "100000"}, 8, None),
        ("2:cpu:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 64, None),
        ("4:memory:/a\n0::/", {"memory/a/memory.limit_in_bytes": "5", "memory/memory.limit_in_bytes": HUGE}, 64, 5),
    ],
)  # fmt: skip
def test_limits_of_control_groups(
    groups: str,
    files: dict[str, str],
    cores: int,
    memory: int | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = tmp_path / "own"
    own.write_text(f"{groups}\n")
    for name, text in files.items():
        file = tmp_path / "groups" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")
    monkeypatch.setattr(limits, "OWN", own)
    monkeypatch.setattr(limits, "GROUPS", tmp_path / "groups")
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(64)))
    total = psutil.virtual_memory().total
    assert (limits.cores(), limits.memory()) == (cores, memory or total)
    assert limits.free_memory() <= limits.memory()


def test_a_process_that_may_run_on_one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {5})
    assert limits.cores() == 1

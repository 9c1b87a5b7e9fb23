"""What of this machine a process may use: containers, batch jobs and `taskset` leave it fewer cores, or less memory."""

import os
from collections.abc import Iterator
from pathlib import Path

import psutil

OWN = Path("/proc/self/cgroup")
GROUPS = Path("/sys/fs/cgroup")


def cores() -> int:
    """Whole cores: those that the process may run on, or the quota of its control groups where that is less."""
    limits = [float(len(os.sched_getaffinity(0)))]
    quotas = [text.split() for text in _settings("cpu", "cpu.max")]
    both = (_settings("cpu", "cpu.cfs_quota_us"), _settings("cpu", "cpu.cfs_period_us"))
    quotas += [list(pair) for pair in zip(*both, strict=True)]
    limits += [int(quota) / int(period) for quota, period in quotas if quota not in ("max", "-1")]
    return max(1, int(min(limits)))


def memory() -> int:
    """Bytes of main memory: the machine's, or the limit of the control groups where that is less."""
    texts = [text for name in ("memory.max", "memory.limit_in_bytes") for text in _settings("memory", name)]
    return min([psutil.virtual_memory().total, *(int(text) for text in texts if text != "max")])


def free_memory() -> int:
    """Bytes that are free on the machine, at most the limit. What others of the control group use is not subtracted."""
    return min(psutil.virtual_memory().available, memory())


def _settings(controller: str, name: str) -> Iterator[str]:
    """What a file says in the control group of this process, and in each group above it, of version 1 or 2.

    Within a container the path of the group may be the host's: then only the root is there.
    """
    for line in OWN.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = GROUPS / controller if controllers else GROUPS
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(root) and (folder / name).is_file():
                yield (folder / name).read_text().strip()

"""Memory that a run takes, and what its machine has left."""

import shutil
from collections.abc import Mapping
from pathlib import Path

import psutil

GIB = 2**30
ROLES = {"ray::RolloutWorker": "memory/workers", "ray::LearnerRank": "memory/ranks"}
"""How Ray names the processes of its actors."""


def usage(run_dir: Path) -> Mapping[str, float]:
    """Metrics, in GiB: resident memory of this process and of its descendants by role, and free memory and disk.

    Pages that processes share count in each. Actors on other machines are not seen.
    """
    driver = psutil.Process()
    found = {"memory/driver": driver.memory_info().rss / GIB, "memory/others": 0.0}
    for process in driver.children(recursive=True):
        try:
            name, size = process.cmdline()[:1], process.memory_info().rss / GIB
        except psutil.Error:  # it has ended
            continue
        role = next((role for start, role in ROLES.items() if name and name[0].startswith(start)), "memory/others")
        found[role] = found.get(role, 0.0) + size
    found["system/memory_free"] = psutil.virtual_memory().available / GIB
    found["system/disk_free"] = shutil.disk_usage(run_dir).free / GIB
    return found

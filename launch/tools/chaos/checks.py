"""What a disturbed run must have in common with one that nobody has disturbed."""

import json
from pathlib import Path
from typing import Any

from launch.run.tracking import METRICS_FILE, SAMPLES_FILE, read_log


def differences(run: Path, reference: Path) -> list[str]:
    """The disturbed run against the other: what is not the same, bit for bit, but for times."""
    parts = {"metrics": rows, "samples": samples, "weights": weights, "files": files}
    return [f"other {what}" for what, read in parts.items() if read(run) != read(reference)]


def rows(run: Path) -> list[dict[str, Any]]:
    """The metrics but for times, in their order."""
    timed = ("time", "timing_s/", "perf/", "memory/", "system/")
    return [{k: v for k, v in row.items() if not k.startswith(timed)} for row in read_log(run / METRICS_FILE)]


def samples(run: Path) -> str:
    return (run / SAMPLES_FILE).read_text()


def weights(run: Path) -> bytes:
    return (run / "final" / "model.safetensors").read_bytes()


def files(run: Path) -> list[str]:
    """Names of all files: a lock or a part of a file that is left shows here."""
    return sorted(str(path.relative_to(run.parent)) for path in run.parent.rglob("*"))


def lost_and_doubled(run: Path, reference: Path) -> tuple[list[str], list[str]]:
    """Steps of the log, and prompts of the pool, that are not there, or more than once."""
    lost, doubled = [], []
    for what, read in (("step", _steps), ("prompt", _prompts)):
        there, expected = read(run), read(reference)
        lost += [f"{what} {item}" for item in sorted(set(expected) - set(there))]
        doubled += [f"{what} {item}" for item in sorted(set(there)) if there.count(item) > 1 or item not in expected]
    return lost, doubled


def _steps(run: Path) -> list[str]:
    """The steps that trained."""
    return [f"{row['step']:06d}" for row in read_log(run / METRICS_FILE) if "training/rollouts" in row]


def _prompts(run: Path) -> list[str]:
    """The pool of the last checkpoint."""
    newest = max((run / "checkpoints").glob("step_*"))
    return list(json.loads((newest / "state.json").read_text())["pool"]["ids"])

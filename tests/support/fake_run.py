"""A run without Ray or torch, for `qarl chaos`: a driver with children that have the names of a real run's.

`python tests/support/fake_run.py RUN [FAULT]`. FAULT breaks it: it `doubles` its last step, `leaves` a process behind,
or `differs` in its weights.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

STEPS = 6
NAMES = {"worker": "ray::RolloutWorker", "rank": "ray::LearnerRank"}
NAMES |= {"raylet": "/raylet/raylet", "verifier": "rewards.child"}
NEEDED = ("rank", "raylet")
"""The run ends with an error when one of them dies; the others are replaced."""


def child(name: str) -> subprocess.Popen[bytes]:
    """It ends with its parent: its input does."""
    return subprocess.Popen([name, "-c", "read _"], executable="/bin/sh", stdin=subprocess.PIPE)


def say(run: Path, log: str, line: str) -> None:
    with (run / "logs" / f"{log}.log").open("a") as file:
        file.write(f"{line}\n")
    time.sleep(0.01)


def steps_done(run: Path) -> int:
    """The step of the newest whole checkpoint; the log is cut there."""
    for folder in (run / "checkpoints").glob("step_*"):
        files = [folder / "state.json", folder / "manifest.json"]
        if folder.suffix == ".part" or files[0].read_bytes() != files[1].read_bytes():
            shutil.rmtree(folder)
    done = max((int(folder.name[5:]) for folder in (run / "checkpoints").glob("step_*")), default=0)
    log = run / "metrics.jsonl"
    rows = log.read_text().splitlines() if log.exists() else []
    log.write_text("".join(f"{row}\n" for row in rows[:done]))
    return done


def save(run: Path, step: int) -> None:
    final = run / "checkpoints" / f"step_{step:06d}"
    part = final.with_suffix(".part")
    part.mkdir(parents=True)
    state = json.dumps({"step": step, "pool": {"ids": ["a", "b"]}})
    (part / "state.json").write_text(state)
    (part / "manifest.json").write_text(state)
    time.sleep(0.03)
    part.rename(final)


def main(run: Path, fault: str) -> int:
    (run / "logs").mkdir(parents=True, exist_ok=True)
    lock = run.with_name(f".{run.name}.lock").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    lock.write(str(os.getpid()))
    children = {role: child(name) for role, name in NAMES.items()}
    if fault == "leaves":
        subprocess.Popen(["sleep", "30"])
    (run / "checkpoints").mkdir(exist_ok=True)
    done = steps_done(run)
    for step in range(done + 1, STEPS + 1):
        say(run, "worker-0", "loads weights version")
        say(run, "worker-0", "now samples 4 requests")
        say(run, "rank-0", "learns from 4")
        say(run, "rank-0", "update from 1.0 for 2.0 s")
        for role, process in list(children.items()):
            if process.poll() is not None:
                if role in NEEDED:
                    return 1
                children[role] = child(NAMES[role])
        row = json.dumps({"step": step, "training/rollouts": step, "time": time.time()}) + "\n"
        with (run / "metrics.jsonl").open("a") as file:
            file.write(row * (2 if fault == "doubles" and step == STEPS else 1))
        save(run, step)
    (run / "final").mkdir(exist_ok=True)
    (run / "final" / "model.safetensors").write_bytes(os.urandom(9) if fault == "differs" else b"weights")
    (run / "samples.jsonl").touch()
    (run / "summary.json").touch()
    return 0


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(130))
    run = Path(sys.argv[1])
    try:
        code = main(run, sys.argv[2] if len(sys.argv) > 2 else "")
    except (OSError, SystemExit) as error:
        code = 130 if isinstance(error, SystemExit) else 1
    if code:
        print("qarl: ended", file=sys.stderr, flush=True)
    run.with_name(f".{run.name}.lock").unlink(missing_ok=True)
    os._exit(code)

"""A run without Ray or torch, for `qarl chaos`: a driver with children that have the names of a real run's.

`python tests/support/fake_run.py RUN [FAULT]`. FAULT breaks it: it `doubles` its last step, `leaves` a process behind,
`differs` in its weights, `loses` the result of a prompt, `forgets` a prompt in flight or asks for it `again`, `scores`
a group twice (`retells`: the pool takes the second result, too), `skips` a group of its last step, or `swaps` the
results of two prompts.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from array import array
from pathlib import Path

STEPS = 6
PROMPTS, GROUP_SIZE = ["a", "b", "c"], 4
CONFIG = f"""
model: {{path: m}}
task: {{kind: sorting}}
learner: {{minibatches: 1}}
train: {{prompts_per_step: 2, group_size: {GROUP_SIZE}}}
"""
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


def responses(step: int, fault: str) -> int:
    """Of all steps until this one."""
    return 2 * GROUP_SIZE * step - GROUP_SIZE * (fault == "skips" and step == STEPS)


def state_of(step: int, fault: str) -> dict[str, object]:
    """Each step takes the groups of a and b, while c is in flight until the end."""
    is_last = step == STEPS
    visits = [step, step, 0]
    if is_last:
        visits[0] -= fault == "swaps"
        visits[1] += (fault in ("retells", "swaps")) - (fault in ("loses", "skips"))
    in_flight = [["c", 0]] * (not is_last or fault == "forgets")
    return {
        "step": step,
        "progress": {"step": step, "rollouts": responses(step, fault)},
        "pool": {
            "ids": PROMPTS,
            "columns": {"visits": base64.b64encode(array("q", visits).tobytes()).decode()},
            "in_flight": ["c"] * len(in_flight),
            "archive": {},
            "gauges": {"unknown_results": int(fault == "scores"), "evicted": 0, "reinserted": 0},
        },
        "in_flight": [] if fault == "forgets" else in_flight * (2 if fault == "again" else 1),
    }


def save(run: Path, step: int, fault: str) -> None:
    final = run / "checkpoints" / f"step_{step:06d}"
    part = final.with_suffix(".part")
    part.mkdir(parents=True)
    state = json.dumps(state_of(step, fault))
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
    (run / "config.yaml").write_text(CONFIG)
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
        row = json.dumps({"step": step, "training/rollouts": responses(step, fault), "time": time.time()}) + "\n"
        with (run / "metrics.jsonl").open("a") as file:
            file.write(row * (2 if fault == "doubles" and step == STEPS else 1))
        save(run, step, fault)
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

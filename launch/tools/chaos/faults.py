"""The kinds of faults that `qarl chaos` injects, and the points of a run where it does."""

import os
import resource
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from random import Random

import psutil

from launch.tools.chaos.start import Start

STARTING_S = 20.0
"""Within so many seconds a fault of the phase "starting" comes."""
JITTER_S = 0.5
"""At most so long after any other phase has begun its fault comes."""
SLOW_S = 3.0
"""How long a worker is slow."""
FULL_S = 20.0
"""How long the disk is full, when the run does not end before."""
BALLAST = ".ballast"

Injection = Callable[[Start, Random], bool]
"""Injects a fault; False when what it needs is not there."""


@dataclass(frozen=True)
class Fault:
    """A kind of fault.

    Attributes:
        inject: does it.
        codes: the exit codes that a start may have after it. 0 is always one: the start was at its end.
    """

    inject: Injection
    codes: tuple[int, ...] = (0,)


def send(number: signal.Signals, words: str = "", group: bool = False) -> Injection:
    """A signal to one of the processes whose command line has `words`, or to the driver; with `group` to its whole
    process group, as from a terminal."""

    def fault(start: Start, rng: Random) -> bool:
        found = start.find(words)
        with suppress(ProcessLookupError):
            if found:
                (os.killpg if group else os.kill)(rng.choice(found), number)
                return True
        return False

    return fault


def slow(start: Start, rng: Random) -> bool:
    """One worker runs a fifth of the time, for `SLOW_S`."""
    found = start.find(WORKER)
    if not found:
        return False
    worker, began = rng.choice(found), time.monotonic()
    with suppress(ProcessLookupError):
        while time.monotonic() - began < SLOW_S:
            os.kill(worker, signal.SIGSTOP)
            time.sleep(0.4)
            os.kill(worker, signal.SIGCONT)
            time.sleep(0.1)
    return True


def full_disk(start: Start, _: Random) -> bool:
    """The disk of the run is full until the run ends, or for a while. Where the run has no disk of its own, no file of
    the driver and the ranks may grow any more: they stay so."""
    disk = start.run.parent
    if not os.path.ismount(disk):
        for pid in (*start.find(""), *start.find(RANK)):
            with suppress(psutil.Error):
                psutil.Process(pid).rlimit(psutil.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
        return True
    began, ballast = time.monotonic(), disk / BALLAST
    while start.process.poll() is None and time.monotonic() - began < FULL_S:
        with suppress(OSError), ballast.open("ab", buffering=0) as file:
            while True:  # until nothing fits any more; the run may remove files meanwhile
                file.write(bytes(4096))
        time.sleep(0.1)
    ballast.unlink()
    return True


def damaged_checkpoint(start: Start, rng: Random) -> bool:
    """The driver is killed, and a byte of the newest checkpoint changes; only where there is one before it."""
    if len(start.checkpoints()) < 2:
        return False
    start.process.kill()
    start.process.wait()
    start.left()
    newest = start.checkpoints()[-1]
    file = rng.choice(sorted(path for path in newest.rglob("*") if path.is_file() and path.stat().st_size))
    data = bytearray(file.read_bytes())
    data[rng.randrange(len(data))] ^= 1
    file.write_bytes(data)
    return True


WORKER, RANK = "ray::RolloutWorker", "ray::LearnerRank"
INTERRUPTED, FAILED, KILLED = (0, 130), (0, 1), (0, -signal.SIGKILL)
FAULTS = {
    "worker killed": Fault(send(signal.SIGKILL, WORKER)),
    "worker hangs": Fault(send(signal.SIGSTOP, WORKER)),
    "worker slow": Fault(slow),
    "rank killed": Fault(send(signal.SIGKILL, RANK), FAILED),
    "rank hangs": Fault(send(signal.SIGSTOP, RANK), FAILED),
    "driver killed": Fault(send(signal.SIGKILL), KILLED),
    "verifier killed": Fault(send(signal.SIGKILL, "rewards.child")),
    "raylet killed": Fault(send(signal.SIGKILL, "/raylet/raylet"), (*FAILED, 2)),  # 2: Ray itself was still starting
    "SIGTERM": Fault(send(signal.SIGTERM), INTERRUPTED),
    "SIGINT": Fault(send(signal.SIGINT), INTERRUPTED),
    "disk full": Fault(full_disk, FAILED),
    "checkpoint damaged": Fault(damaged_checkpoint, KILLED),
}


def _more(log: str, words: str) -> Callable[[Start], Callable[[], bool]]:
    """Whether a log has `words` once more than when it was asked first."""

    def begins(start: Start) -> Callable[[], bool]:
        before = start.new(f"logs/{log}.log").count(words)
        return lambda: start.new(f"logs/{log}.log").count(words) > before

    return begins


PHASES: dict[str, Callable[[Start], Callable[[], bool]]] = {
    "starting": lambda start: lambda: start.wrote(f"../.{start.run.name}.lock"),
    "sampling": _more("worker-0", " samples "),
    "loading": _more("worker-0", "loads weights version"),
    "learning": _more("rank-0", "learns from"),
    "publishing": _more("rank-0", "update from"),
    "checkpointing": lambda start: start.is_saving,
}
"""What tells that a phase begins."""

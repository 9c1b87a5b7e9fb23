"""Runs over two Ray nodes in network namespaces, whose link is slow, or cut and healed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from launch.tools.chaos.campaign import ending
from launch.tools.chaos.checks import differences, lost_and_doubled
from launch.tools.chaos.faults import RANK, WORKER
from launch.tools.chaos.start import LEFT_AFTER_S, Start

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
HEAD, FAR = "10.77.0.1", "10.77.0.2"
HEALTH = {"initial_delay_ms": "5000", "period_ms": "1000", "timeout_ms": "5000", "failure_threshold": "3"}
"""Ray's checks of a node: without an answer it is dead after 18 s. By default that takes over a minute."""
CUT_S, LOST_S = 5.0, 45.0
"""How long the link is cut: a while, and until the far node is dead."""


def ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


class Nodes:
    """The head of a cluster and a far node, each in a network namespace of its own. A pair of veth devices links them.

    Args:
        home: folder of all that they write; its path is short, as Ray's sockets lie there.
    """

    def __init__(self, home: Path) -> None:
        self.home, self._head, self._far = home, f"qarl-{os.getpid()}-head", f"qarl-{os.getpid()}-far"
        self.env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        self.env |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "TMPDIR": str(home)}
        self.env |= {f"RAY_health_check_{name}": value for name, value in HEALTH.items()}

    def build(self) -> None:
        for name in (self._head, self._far):
            ip("netns", "add", name)
        ip("link", "add", "veth", "netns", self._head, "type", "veth", "peer", "name", "veth", "netns", self._far)
        for name, address in ((self._head, HEAD), (self._far, FAR)):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "veth")
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", "veth", "up")

    def remove(self) -> None:
        for name in {self._head, self._far}.intersection(ip("netns", "list").split()):
            self._kill(name)
            ip("netns", "delete", name)

    def start_head(self) -> None:
        self._start(self._head, "--head", "--port=6399", "--include-dashboard=false", f"--node-ip-address={HEAD}")

    def start_far(self) -> None:
        """With two CPUs, so that what asks for both runs there."""
        self._start(self._far, f"--address={HEAD}:6399", f"--node-ip-address={FAR}", cpus=2)

    def far_lives(self) -> bool:
        return any(FAR in " ".join(process.cmdline()) for process in self.processes("raylet/raylet"))

    def _start(self, name: str, *words: str, cpus: int = 1) -> None:
        own = ("ray", "start", *words, f"--num-cpus={cpus}", "--object-store-memory=100000000")
        log = self.home / f"{name}.log"
        for _ in range(3):  # Ray's own patience is short on a busy machine
            with log.open("w") as file:  # its processes stay, and would keep a pipe open
                done = subprocess.run(self._inside(name, *own), env=self.env, stdout=file, stderr=file, timeout=180)
            if done.returncode == 0:
                return
            self._kill(name)
        raise AssertionError(log.read_text())

    def train(self, model: Path, *settings: str) -> Start:
        """Start or continue the run, at the head."""
        command = train(self.home, model, f"cluster.address={HEAD}:6399", *settings)
        return Start(run_in(self.home), self._inside(self._head, *command), self.home, self.env, ROOT)

    def link(self, state: str) -> None:
        """`up` or `down`."""
        ip("-n", self._far, "link", "set", "veth", state)

    def slow_down(self) -> None:
        """To 2 Mbit/s both ways."""
        for name in (self._head, self._far):
            tbf = ("tbf", "rate", "2mbit", "burst", "16kbit", "latency", "2s")
            subprocess.run(["tc", "-n", name, "qdisc", "add", "dev", "veth", "root", *tbf], check=True)

    def processes(self, words: str) -> list[psutil.Process]:
        """Of both nodes, those whose command line has `words`."""
        found = []
        for name in (self._head, self._far):
            for pid in self._pids(name):
                with suppress(psutil.Error):
                    process = psutil.Process(pid)
                    found += [process] if words in " ".join(process.cmdline()) else []
        return found

    def _kill(self, name: str) -> None:
        for pid in self._pids(name):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    @staticmethod
    def _pids(name: str) -> list[int]:
        found = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout
        return [int(pid) for pid in found.split()]

    @staticmethod
    def _inside(name: str, *command: str) -> list[str]:
        return ["ip", "netns", "exec", name, *command]


def run_in(folder: Path) -> Path:
    return folder / "runs" / "chaos"


def train(folder: Path, model: Path, *settings: str) -> list[str]:
    """The command of a run in `folder`; the first one builds the model."""
    run_in(folder).parent.mkdir(parents=True, exist_ok=True)
    own = ("train.steps=12", "eval.every=6", f"model.path={model}", f"run.dir={run_in(folder).parent}")
    return [sys.executable, "-m", "launch.cli", "train", "chaos", *own, "rollout.timeout_s=300", *settings]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run on one node, to whose bits the others must come."""
    folder = tmp_path_factory.mktemp("undisturbed")
    start = Start(run_in(folder), train(folder, folder / "model"), folder, cwd=ROOT)
    with ending(start):
        assert start.faults_of_end([0]) == []
    return start.run


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    if os.geteuid() or not (shutil.which("ip") and shutil.which("tc")):
        pytest.skip("network namespaces need root, `ip` and `tc`")
    nodes = Nodes(Path(tempfile.mkdtemp(prefix="q")))
    try:
        nodes.build()
        nodes.start_head()
        nodes.start_far()
        yield nodes
    finally:
        nodes.remove()
        shutil.rmtree(nodes.home, ignore_errors=True)


def wait_for_steps(start: Start, steps: int) -> None:
    while start.new("metrics.jsonl").count("training/rollouts") < steps:
        assert start.process.poll() is None, start.stderr()
        assert not start.hangs()
        time.sleep(0.05)


def check(run: Path, undisturbed: Path, nodes: Nodes) -> None:
    """It has the bits of the undisturbed run, and has left no actor."""
    assert differences(run, undisturbed) == []
    assert lost_and_doubled(run, undisturbed) == ({}, {})
    ended = time.monotonic()
    while (left := nodes.processes(WORKER) + nodes.processes(RANK)) and time.monotonic() - ended < LEFT_AFTER_S:
        time.sleep(0.1)
    assert not left


def test_a_run_survives_a_link_that_is_cut_then_slow_and_its_workers_node_lost(nodes: Nodes, undisturbed: Path) -> None:
    model = undisturbed.parents[1] / "model"
    start = nodes.train(model, "rollout.num_cpus_per_worker=2")
    with ending(start):
        wait_for_steps(start, 2)
        nodes.link("down")
        time.sleep(CUT_S)
        nodes.link("up")
        wait_for_steps(start, 4)
        nodes.slow_down()
        wait_for_steps(start, 7)
        nodes.link("down")
        time.sleep(LOST_S)
        nodes.link("up")
        while nodes.far_lives():  # it ends when it hears that it was given up
            time.sleep(0.1)
        nodes.start_far()  # the worker starts there again
        assert start.faults_of_end([0]) == []
    check(start.run, undisturbed, nodes)


def test_a_run_whose_ranks_node_is_lost_ends_and_resumes(nodes: Nodes, undisturbed: Path) -> None:
    model = undisturbed.parents[1] / "model"
    start = nodes.train(model, "learner.num_cpus_per_rank=2")
    with ending(start):
        wait_for_steps(start, 2)
        nodes.link("down")
        assert start.faults_of_end([1]) == []
        nodes.link("up")
    while nodes.far_lives():
        time.sleep(0.1)
    nodes.start_far()
    again = nodes.train(model, "learner.num_cpus_per_rank=2")
    with ending(again):
        assert again.faults_of_end([0]) == []
    check(again.run, undisturbed, nodes)

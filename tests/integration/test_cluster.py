"""Two nodes on this machine by `ray_cluster.sh`, with token authentication, and a job over both."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

COUNT_NODES = """
import sys, time
import ray

@ray.remote(num_cpus=1)
def node() -> str:
    time.sleep(1)  # long enough that one node cannot take both
    return ray.get_runtime_context().get_node_id()

ray.init("auto", log_to_driver=False)
print("nodes used:", len(set(ray.get([node.remote(), node.remote()]))))
sys.exit(int(sys.argv[1]))
"""

SUBMIT = """
import sys
from launch.cluster.jobs import run_job
from qarl.errors import QarlError
try:
    sys.exit(run_job(sys.argv[1], sys.argv[2], wait=len(sys.argv) == 3))
except QarlError as error:
    sys.exit(f"error: {error}")
"""


class Cluster:
    """Home, token, state and Ray's files of one test, in a short path (sockets) of its own."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        self.env |= {"HOME": str(home), "QARL_CLUSTER_DIR": str(home / "state")}

    def sh(self, *args: object) -> subprocess.CompletedProcess[str]:
        return self.run(ROOT / "launch/cluster/ray_cluster.sh", *args)

    def submit(self, command: str, dashboard: str, *flags: str, **env: str) -> subprocess.CompletedProcess[str]:
        return self.run(sys.executable, "-c", textwrap.dedent(SUBMIT), command, dashboard, *flags, **env)

    def run(self, *command: object, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(part) for part in command], env=self.env | env, cwd=ROOT, capture_output=True, text=True, timeout=180
        )

    def processes(self) -> dict[int, str]:
        """What descends from this cluster's commands: their environment, or their arguments, name its home."""
        found = {}
        for proc in Path("/proc").glob("[0-9]*"):
            try:
                command, environ = (proc / "cmdline").read_bytes(), (proc / "environ").read_bytes()
            except (FileNotFoundError, PermissionError, ProcessLookupError):
                continue
            if str(self.home).encode() in command + environ:
                found[int(proc.name)] = command.replace(b"\0", b" ").decode(errors="replace")
        return found


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    home = Path(tempfile.mkdtemp(prefix="qarl-", dir="/tmp"))
    cluster = Cluster(home)
    yield cluster
    cluster.sh("down")
    for pid in cluster.processes():
        os.kill(pid, signal.SIGKILL)
    shutil.rmtree(home)


def free_ports() -> tuple[int, int]:
    """Two free ports, below 10000 because Ray keeps the ports above for its workers."""
    free = []
    for port in range(7400 + os.getpid() % 1000, 9900):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                free.append(port)
        if len(free) == 2:
            return free[0], free[1]
    raise AssertionError("no free ports")


@pytest.mark.slow
def test_two_nodes_run_a_job_and_end(cluster: Cluster) -> None:
    small = ("--num-cpus", 1, "--", "--object-store-memory", 100_000_000)
    port, dashboard_port = free_ports()
    dashboard = f"http://127.0.0.1:{dashboard_port}"

    head = cluster.sh(
        "head", "--port", port, "--dashboard-port", dashboard_port, "--temp-dir", cluster.home / "t", *small
    )
    assert head.returncode == 0, head.stderr
    joined = re.search(r"worker --address (\S+)", head.stdout)
    assert joined is not None, head.stdout
    assert (cluster.home / ".ray/auth_token").stat().st_mode & 0o077 == 0

    worker = cluster.sh("worker", "--address", joined[1], *small)
    assert worker.returncode == 0, worker.stderr
    twice = cluster.sh("worker", "--address", joined[1], *small)
    assert twice.returncode == 1
    assert "'worker' runs already" in twice.stderr

    assert wait_for_nodes(cluster, 2)

    script = cluster.home / "count.py"
    script.write_text(COUNT_NODES)
    done = cluster.submit(f"{sys.executable} {script} 0", dashboard)
    assert done.returncode == 0, done.stderr
    assert "nodes used: 2" in done.stdout

    failed = cluster.submit("echo out; exit 3", dashboard)
    assert failed.returncode == 1
    assert "out" in failed.stdout.splitlines()
    assert "exit code 3" in failed.stderr

    stranger = cluster.submit("true", dashboard, RAY_AUTH_TOKEN="0" * 64)
    assert stranger.returncode == 1
    assert "refused this machine's token" in stranger.stderr
    assert len(stranger.stderr.splitlines()) == 1

    # A job that still runs goes down with the cluster, and nothing else does.
    assert cluster.submit("exec sleep 600", dashboard, "no wait").returncode == 0
    assert cluster.processes() != {}
    with subprocess.Popen(["sleep", "600"]) as bystander:
        down = cluster.sh("down")
        survived = bystander.poll() is None
        bystander.kill()
    assert down.returncode == 0, down.stderr
    assert survived
    assert cluster.processes() == {}


def wait_for_nodes(cluster: Cluster, count: int) -> bool:
    """Whether `status` comes to show `count` nodes; the head renews what it shows every few seconds."""
    for _ in range(20):
        status = cluster.sh("status")
        assert status.returncode == 0, status.stderr
        if len(re.findall(r"^ 1 node_", status.stdout, re.MULTILINE)) == count:
            return True
        time.sleep(1)
    return False


@pytest.mark.slow
def test_quickstart_trains_on_two_nodes_with_two_rollout_actors(cluster: Cluster, tmp_path: Path) -> None:
    """The quickstart's stack over two nodes, submitted as a job: two engines, one learner, mismatch zero."""
    port, dashboard_port = free_ports()
    node = ("--num-cpus", 2, "--", "--object-store-memory", 200_000_000)
    temp = ("--temp-dir", cluster.home / "t")
    head = cluster.sh("head", "--port", port, "--dashboard-port", dashboard_port, *temp, *node)
    assert head.returncode == 0, head.stderr
    joined = re.search(r"worker --address (\S+)", head.stdout)
    assert joined is not None
    assert cluster.sh("worker", "--address", joined[1], *node).returncode == 0
    assert wait_for_nodes(cluster, 2)

    settings = [
        *("rollout.num_workers=2", "cluster.placement_strategy=SPREAD", f"run.dir={tmp_path}"),
        *(f"model.path={tmp_path}/model", "model.build.sft.steps=100", "task.levels=[2,3,4]", "train.steps=3"),
        *("train.prompts_per_step=8", "eval.num_prompts=16", "eval.final_num_prompts=16", "learner.minibatches=2"),
        "controls.sft_continued=false",
    ]
    address = f"http://127.0.0.1:{dashboard_port}"
    done = cluster.sh("submit", "quickstart", *settings, "--address", address)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "rollout worker 1: vLLM on cpu" in done.stdout
    rows = [json.loads(line) for line in (tmp_path / "quickstart/metrics.jsonl").read_text().splitlines()]
    trained = [row for row in rows if "reward/mean" in row]
    assert [row["step"] for row in trained] == [1, 2, 3]
    assert all(row["mismatch/logp_abs_max"] == 0.0 for row in trained)

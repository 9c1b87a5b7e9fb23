"""Submitting a training run to a Ray cluster as a job: it goes on when the terminal is closed."""

import asyncio
import logging
import os
import re
import shlex
import socket
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from launch.cluster.token import head_command, read_token
from launch.early import check_input
from qarl.config.io import load_config
from qarl.errors import QarlError, UsageError, first_line

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

CONNECT_TIMEOUT_S = 10.0
POLL_S = 1.0


class ClusterError(QarlError):
    """The cluster cannot be reached, refuses the job, or no longer answers."""


def submit(config_path: str, overrides: list[str], address: str, wait: bool = True) -> int:
    """Train `config_path` as a job on the cluster whose dashboard is at `address`, and follow its log.

    Nothing is uploaded: the nodes must have this repository, this Python and the working directory at the same paths.
    Config and overrides are checked here, before anything is sent. Returns 0 when the job succeeded (without `wait`:
    was accepted), 1 when it failed or was stopped.

    Raises:
        ConfigError: the config or an override is wrong.
        PreflightError: the run cannot work on any machine.
        UsageError: `address` is not an HTTP address.
        ClusterError: nothing answers there, the token is wrong, or the connection broke.
    """
    overrides = [*overrides, "cluster.address=auto"]
    config = load_config(config_path, overrides)
    check_input(config)
    _parts(address)
    from launch.preflight import check, faults_on_any_machine  # late: torch is slow to import

    check(faults_on_any_machine(config))
    return run_job(entrypoint(config_path, overrides), address, wait)


def entrypoint(config_path: str, overrides: list[str]) -> str:
    """The shell command that the head node runs: this Python, in this working directory."""
    train = [sys.executable, "-u", "-m", "launch.cli", "train", str(Path(config_path).resolve()), *overrides]
    return f"cd {shlex.quote(os.getcwd())} && exec {shlex.join(train)}"


def run_job(command: str, address: str, wait: bool) -> int:
    """Run a shell command as a Ray job; returns and raises as `submit` does."""
    address = _reachable(address)
    client = _connect(address)
    try:
        job = client.submit_job(entrypoint=command)
        print(f"job {job} submitted to {address}")
        if not wait:
            return 0
        print(f"Ctrl-C leaves it running; to stop it: ray job stop {job} --address {address}", flush=True)
        return _follow(client, job)
    except (OSError, RuntimeError) as error:
        raise ClusterError(first_line(error), where=address, hint="the job may go on: see the dashboard") from error


def _reachable(address: str) -> str:
    """`address` in full, once something listens there: Ray itself would wait for minutes."""
    scheme, host, port = _parts(address)
    full = f"{scheme}{host}:{port}"
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT_S).close()
    except OSError as error:
        what = f"no Ray dashboard answers ({error})"
        hint = f"start a head with {head_command()}, or give the right --address"
        raise ClusterError(what, full, hint) from error
    return full


def _parts(address: str) -> tuple[str, ...]:
    """Scheme, host and port. Raises UsageError."""
    match = re.fullmatch(r"(https?://)?([^\s/:]+):(\d{1,5})/?", address)
    if match is None or int(match[3]) > 65535:
        raise UsageError(f"'{address}' is not a dashboard address", hint="write http://host:8265")
    return match.groups(default="http://")


def _connect(address: str) -> "JobSubmissionClient":
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    os.environ["RAY_API_SERVER_ADDRESS"] = address  # Ray lets its variables win over the argument
    logging.getLogger("ray.dashboard.modules.job.sdk").setLevel(logging.WARNING)
    token = read_token()  # the client sends it only in a process that was started with RAY_AUTH_MODE=token
    try:
        return JobSubmissionClient(address, headers={"Authorization": f"Bearer {token}"} if token else None)
    except AuthenticationError as error:
        what = "the head refused this machine's token" if token else "the head requires a token, this machine has none"
        hint = "copy ~/.ray/auth_token from the head (mode 600), or set RAY_AUTH_TOKEN"
        raise ClusterError(what, address, hint) from error
    except (OSError, RuntimeError) as error:
        raise ClusterError(first_line(error), where=address, hint="is this a Ray dashboard?") from error


def _follow(client: "JobSubmissionClient", job: str) -> int:
    asyncio.run(_print_log(client, job))
    while not (info := client.get_job_info(job)).status.is_terminal():
        time.sleep(POLL_S)
    if info.status == "SUCCEEDED":
        return 0
    reason = first_line(info.message).partition(", last available logs")[0]
    print(f"job {job} {info.status.lower()}: {reason}", file=sys.stderr)
    return 1


async def _print_log(client: "JobSubmissionClient", job: str) -> None:
    from aiohttp import ClientError

    try:
        async for lines in client.tail_job_logs(job):
            print(lines, end="", flush=True)
    except ClientError as error:
        raise ConnectionError(f"the log ended early: {first_line(error)}") from error

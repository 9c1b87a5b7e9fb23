"""Joining a Ray cluster, or starting a Ray of our own."""

import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from typing import Any

import psutil
import ray
import torch
from ray._private import utils as ray_utils
from ray.exceptions import AuthenticationError, RayError

from launch import limits
from launch.cluster.token import head_command
from qarl.config.run import Config
from qarl.errors import ResourceError, first_line
from qarl.remote import guard, raise_when_gone

KNOCK_S = 5.0
HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
"""How a client begins, with an empty frame of settings (RFC 9113, section 3.4)."""
HTTP2_SETTINGS = b"\4"
"""Type of the first frame of a server, its fourth byte."""


def connect(config: Config) -> None:
    """Join the cluster at `cluster.address`, or start a Ray of our own that ends with this process; once.

    Raises ResourceError: no cluster answers, it refuses this machine's token, or Ray cannot be started.
    """
    if ray.is_initialized():
        return
    with signals_after_start():
        _connect(config.cluster.address)


@contextmanager
def signals_after_start() -> Iterator[None]:
    """Interrupts that come while Ray starts take effect when it has started, or failed to.

    Python drops an exception that a handler raises within a fork, of which Ray makes many. And Ray replaces the handler
    for SIGTERM by one that ends the process with a C++ stack (Ray issue 17308), without a setting for it: while it
    starts, its function that does so does nothing. Its processes inherit that SIGHUP is blocked: a terminal that closes
    sends it to all of them, and Ray would wait for minutes for one that has ended.
    """
    pending: list[int] = []
    numbers = [
        n for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) not in (signal.SIG_IGN, None)
    ]
    handlers = {number: signal.signal(number, lambda number, _: pending.append(number)) for number in numbers}
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGHUP])
    set_by_ray, ray_utils.set_sigterm_handler = ray_utils.set_sigterm_handler, lambda _: None
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        ray_utils.set_sigterm_handler = set_by_ray
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if pending:
            raise KeyboardInterrupt


def _connect(address: str | None) -> None:
    if address is None:
        # "local": without it Ray would join whatever cluster this machine already runs.
        own = {"num_cpus": limits.cores(), "num_gpus": torch.cuda.device_count()}
        guard(f"_{os.getpid()}/logs/raylet.out")  # Ray names the folder of a session by its time and driver
        try:
            ray.init("local", **own, include_dashboard=False, log_to_driver=False, logging_level="error")
        except Exception as error:
            # Ray raises a plain Exception when its processes start too slowly. Anything else is a mistake of ours.
            if type(error) is not Exception and not isinstance(error, (OSError, RuntimeError, ValueError, RayError)):
                raise
            hint = "see RAY_TMPDIR, and whether other programs take all cores"
            raise ResourceError(f"Ray cannot be started here: {first_line(error)}", "", hint) from error
        for process in psutil.Process().children(recursive=True):
            if _command(process).split(" --")[0].endswith("/raylet/raylet"):
                raise_when_gone(process.pid)
        return
    try:
        _knock(address)
        ray.init(address, log_to_driver=False, logging_level="error")
    except AuthenticationError as error:
        what = "the cluster refused this machine's token"
        hint = "copy ~/.ray/auth_token from the head (mode 600), or set RAY_AUTH_TOKEN"
        raise ResourceError(what, f"cluster.address {address}", hint) from error
    except OSError as error:
        what = f"no Ray cluster answers at {address} ({error})"
        raise ResourceError(what, "cluster.address", f"start one with {head_command()}") from error
    except ValueError as error:
        raise ResourceError(f"'{address}' is no address", "cluster.address", "write host:port, or auto") from error
    except RuntimeError as error:  # another version of Ray or Python, mostly
        what = f"the cluster at {address} cannot be joined: {first_line(error)}"
        raise ResourceError(what, "cluster.address", "its nodes need this version of Ray and of Python") from error


def _command(process: psutil.Process) -> str:
    """What runs there; empty for a process that has ended meanwhile."""
    with suppress(psutil.Error):
        return " ".join(process.cmdline()[:3]).lower()
    return ""


@contextmanager
def ray_messages_logged() -> Iterator[None]:
    """Log what Ray prints of dead actors: the terminal has our line. Ray has no setting for it, but a thread."""
    with redirect_stdout(_Terminal(sys.stdout)):
        yield


class _Terminal:
    """`stream`, but for the texts of Ray's thread, which go to the log."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        if threading.current_thread().name != "ray_listen_error_messages":
            return int(self._stream.write(text))
        if text.strip():
            logging.getLogger(__name__).warning(text.strip())
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _knock(address: str) -> None:
    """Raises OSError when nothing listens at host:port, or what listens does not speak HTTP/2, as Ray's head does: Ray
    itself would wait for minutes. Raises ValueError for what is no address.

    "auto" is a cluster that Ray finds by itself, `ray://host:port` a client's, which answers likewise.
    """
    if address == "auto":
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or "/" in host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise ValueError(address)
    with socket.create_connection((host, int(port)), timeout=KNOCK_S) as link:
        link.sendall(HTTP2_PREFACE)
        answer = link.recv(9)
    if answer[3:4] != HTTP2_SETTINGS:
        raise ConnectionError(f"it answers {answer!r}")

"""Joining a cluster: what is no cluster is told at once."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from unittest.mock import Mock

import pytest
import ray
from ray._private import utils as ray_utils

from launch.cluster.connect import connect, signals_after_start
from qarl.config.io import validate
from qarl.config.run import Config
from qarl.errors import ResourceError


def make_config(address: str | None) -> Config:
    return validate({"model": {"path": "m"}, "task": {"kind": "sorting"}, "cluster": {"address": address}}, "test")


@pytest.fixture
def answers(request: pytest.FixtureRequest) -> Iterator[str]:
    """The address of a server that gives one answer and no more."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            link, _ = server.accept()
            with link:
                link.recv(100)
                link.sendall(request.param)

        threading.Thread(target=serve, daemon=True).start()
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize(
    "answers", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"SSH-2.0-OpenSSH_9.6\r\n", b""], indirect=True
)
def test_what_is_no_ray_is_told_at_once(answers: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "init", Mock())  # it would wait for minutes
    with pytest.raises(ResourceError, match=f"no Ray cluster answers at {answers}"):
        connect(make_config(answers))
    ray.init.assert_not_called()


@pytest.mark.parametrize("answers", [bytes([0, 0, 6, 4, 0, 0, 0, 0, 0]) + bytes(6)], indirect=True)
def test_what_speaks_http2_is_joined(answers: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "init", Mock())
    connect(make_config(answers))
    assert ray.init.call_args.args == (answers,)


@pytest.mark.parametrize(
    "address", ["", "nonsense", "host:", ":6379", "host:0", "host:70000", "http://host:6379", "h/x:1"]
)
def test_what_is_no_address(address: str) -> None:
    with pytest.raises(ResourceError, match="is no address; write host:port, or auto"):
        connect(make_config(address))


@pytest.mark.parametrize("error", [RuntimeError("Version mismatch: Ray 2.9\nmore"), ConnectionError("refused")])
def test_a_cluster_that_cannot_be_joined_is_one_line(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "init", Mock(side_effect=error))
    with pytest.raises(ResourceError) as caught:
        connect(make_config("auto"))
    assert str(caught.value).startswith("cluster.address: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "error",
    [OSError("AF_UNIX path"), RuntimeError("no raylet"), ValueError("x"), Exception("timed out")],
)
def test_a_ray_that_cannot_be_started_is_one_line(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "init", Mock(side_effect=error))
    with pytest.raises(ResourceError, match="Ray cannot be started here: "):
        connect(make_config(None))


def test_a_mistake_of_ours_is_no_trouble_of_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "init", Mock(side_effect=TypeError("no such argument")))
    with pytest.raises(TypeError):
        connect(make_config(None))


def test_sigterm_stays_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(ray, "init", lambda *_, **__: signal.signal(signal.SIGTERM, signal.SIG_DFL))
    try:
        signal.signal(signal.SIGTERM, handler := Mock())
        connect(make_config(None))
        assert signal.getsignal(signal.SIGTERM) is handler
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("fails", [False, True])
def test_a_signal_takes_effect_when_ray_has_started(
    monkeypatch: pytest.MonkeyPatch, number: signal.Signals, fails: bool
) -> None:
    """Or has failed to start: the signal may have ended its processes."""
    started = []

    def init(*_: object, **__: object) -> None:
        ray_utils.set_sigterm_handler(signal.SIG_DFL)  # as Ray does; it would end this process
        os.kill(os.getpid(), number)
        started.append(True)
        if fails:
            raise RuntimeError("no raylet")

    monkeypatch.setattr(ray, "init", init)
    before = signal.signal(number, Mock())
    try:
        with pytest.raises(KeyboardInterrupt):
            connect(make_config(None))
    finally:
        signal.signal(number, before)
    assert started


def test_a_terminal_that_closes_leaves_rays_processes_to_us() -> None:
    """It sends SIGHUP to all of them: without its own, Ray would wait for minutes."""
    mask = ["sed", "-n", "s/^SigBlk:\t//p", "/proc/self/status"]
    blocked = []
    for around in (signals_after_start, nullcontext):
        with around():
            blocked.append(int(subprocess.run(mask, capture_output=True, text=True, check=True).stdout, 16))
    assert [bool(found & 1 << signal.SIGHUP - 1) for found in blocked] == [True, False]
    assert [bool(found & 1 << signal.SIGTERM - 1) for found in blocked] == [False, False]


def test_rays_own_way_to_set_a_handler_comes_back() -> None:
    before = ray_utils.set_sigterm_handler
    with signals_after_start():
        assert ray_utils.set_sigterm_handler is not before
    assert ray_utils.set_sigterm_handler is before

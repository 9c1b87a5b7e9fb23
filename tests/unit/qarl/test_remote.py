"""The Ray helpers, over real Ray actors."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.exceptions import GetTimeoutError, NodeDiedError, ObjectLostError, OutOfMemoryError, RayActorError

from qarl.errors import AGAIN, ActorError, KernelError, QarlError
from qarl.remote import as_they_end, deaths, free_address, get, how_it_died, raise_when_gone

pytestmark = pytest.mark.usefixtures("local_ray")


class Actor:
    def answer(self, seconds: float = 0.0) -> float:
        time.sleep(seconds)
        return seconds

    def fail(self) -> None:
        try:
            int("four")
        except ValueError as error:
            raise KernelError("no kernel", where="a layer") from error

    def stumble(self) -> None:
        raise RuntimeError("shapes\n  differ\n")

    def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


def start() -> Any:
    return ray.remote(Actor).options(num_cpus=0).remote()


def test_an_error_of_an_actor_shows_the_actors_traceback() -> None:
    with pytest.raises(KernelError) as caught:
        get(start().fail.remote())
    assert type(caught.value) is KernelError
    assert str(caught.value) == "a layer: no kernel"
    printed = "".join(traceback.format_exception(caught.value))  # as Python prints it with QARL_TRACEBACK=1
    assert "test_remote.py" in printed
    assert "in fail" in printed
    assert "ValueError: invalid literal for int()" in printed


def test_any_other_error_of_an_actor_is_one_line() -> None:
    with pytest.raises(ActorError) as caught:
        get(start().stumble.remote())
    assert str(caught.value) == "RuntimeError: shapes differ"
    printed = "".join(traceback.format_exception(caught.value))
    assert "in stumble" in printed


def test_get_returns_what_actors_return() -> None:
    actor = start()
    assert get([actor.answer.remote(), actor.answer.remote(0.25)]) == [0.0, 0.25]
    with pytest.raises(GetTimeoutError):
        get(actor.answer.remote(1000.0), timeout_s=0.1)
    ray.kill(actor)


def test_the_end_of_rays_own_process_is_an_error_that_comes_until_it_ends_us(monkeypatch: pytest.MonkeyPatch) -> None:
    before, seen = signal.getsignal(signal.SIGUSR2), list[str]()

    def is_initialized() -> bool:
        if "ends" in seen:
            seen.append("asked")
        return len(seen) < 4

    def work(raylet: int) -> None:
        try:
            with suppress(Exception):
                raise_when_gone(raylet)
                time.sleep(60)
            time.sleep(60)
        finally:
            seen.append("ends")
            while len(seen) < 4:  # two more signals
                time.sleep(0.01)
            seen.append("closed")

    monkeypatch.setattr(ray, "is_initialized", is_initialized)
    monkeypatch.setattr("qarl.remote.REPEAT_S", 0.1)
    with subprocess.Popen(["sleep", "0.1"]) as process, pytest.raises(QarlError, match="raylet has died"):
        work(process.pid)
    assert seen == ["ends", "asked", "asked", "asked", "closed"]
    signal.signal(signal.SIGUSR2, before)


def test_a_killed_process_is_a_death() -> None:
    with pytest.raises(deaths()) as caught:
        get(start().die.remote())
    assert how_it_died(caught.value) == "was killed or crashed, perhaps by the system for lack of memory, see `dmesg`"


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (RayActorError(error_msg="Worker exits with an exit code 4."), "exited with code 4"),
        (RayActorError(error_msg="with an exit code 1. The process receives a SIGTERM."), "was killed by SIGTERM"),
        (RayActorError(error_msg="The actor never ran"), "RayActorError"),
        (OutOfMemoryError("low on memory"), "was killed by Ray for lack of memory"),
        (NodeDiedError("gone"), "its node is gone"),
    ],
)
def test_how_an_actor_died(error: Exception, told: str) -> None:
    """The texts are Ray's."""
    assert how_it_died(error) == told


def test_calls_come_as_they_end() -> None:
    hanging, other = start(), start()
    never, first, second = hanging.answer.remote(1000.0), other.answer.remote(), other.answer.remote()
    ended = as_they_end([never, second, first])
    assert {next(ended), next(ended)} == {first, second}
    with pytest.raises(GetTimeoutError, match=r"no call ended within 0\.1 s"):
        next(as_they_end([never], timeout_s=0.1))
    ray.kill(hanging)


def test_a_free_address_can_be_listened_on() -> None:
    host, _, port = free_address().rpartition(":")
    with socket.create_server((host, int(port))):
        pass


def end_with_a_guard(end: str) -> subprocess.CompletedProcess[str]:
    code = f"import os, sys; from qarl.remote import guard; guard('_12/raylet.out'); {end}"
    root = str(Path(__file__).parents[3])
    return subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("end", ["pass", "sys.exit(1)", "1 / 0"])
def test_the_guard_is_silent_when_the_process_ends_by_itself(end: str) -> None:
    assert "the driver was killed" not in end_with_a_guard(end).stderr


def test_agents_are_killed_with_the_process_that_started_ray(tmp_path: Path) -> None:
    ours, other = tmp_path / "session_12" / "raylet.out", tmp_path / "session_3" / "raylet.out"
    for log in (ours, other):
        log.parent.mkdir()
    names = [("agent", ours), ("tail", ours), ("agent", other)]
    processes = []
    for name, log in names:
        with log.open("a") as file:
            processes.append(subprocess.Popen([name, "60"], executable="/bin/sleep", stdout=file))
    killed = end_with_a_guard("os.kill(os.getpid(), 9)")
    assert killed.returncode == -signal.SIGKILL
    assert killed.stderr == f"qarl: the driver was killed, or ended by Ray because its raylet has died; {AGAIN}\n"
    agent, *others = processes
    assert agent.wait(timeout=60) == -signal.SIGKILL
    for stranger in others:
        assert stranger.poll() is None
        stranger.kill()
        stranger.wait()


def test_a_result_that_lay_on_a_lost_node_is_a_death() -> None:
    error = ObjectLostError("00" * 28, None, "")
    assert isinstance(error, deaths())
    assert how_it_died(error) == "its node is gone"

"""What a Ray of our own says of a dead actor, and where it listens."""

from __future__ import annotations

import os
import sys
import time
from contextlib import suppress

import psutil
import pytest
import ray

from launch.cluster.connect import ray_messages_logged


class Mortal:
    def die(self) -> None:
        os._exit(1)


def test_what_ray_prints_of_a_dead_actor_is_logged_instead(
    local_ray: None, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with ray_messages_logged():
        actor = ray.remote(Mortal).options(num_cpus=0).remote()
        with pytest.raises(ray.exceptions.ActorDiedError):
            ray.get(actor.die.remote())
        end = time.monotonic() + 60
        while "A worker died" not in caplog.text and time.monotonic() < end:
            time.sleep(0.05)
        print("our line")
        assert sys.stdout.isatty() is False  # the rest is the terminal's
    assert "A worker died" in caplog.text
    assert capsys.readouterr().out == "our line\n"


def test_it_listens_on_this_machine_alone(local_ray: None) -> None:
    """Under the environment that `confine_own_ray` sets: it has no token."""
    listening = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # it has ended meanwhile
            listening += [link.laddr.ip for link in process.net_connections() if link.status == psutil.CONN_LISTEN]
    assert len(listening) > 3
    assert set(listening) <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}

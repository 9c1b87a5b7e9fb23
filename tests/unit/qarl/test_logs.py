"""Log files of processes: real Ray actors, whose C libraries print, too."""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import ray

from qarl.errors import RolloutError
from qarl.logs import MAX_LINE, driver_log, log_file, redirect_output, tail
from qarl.remote import dead, deaths, get

STAMP = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}"


class Speaker:
    def __init__(self, log: Path) -> None:
        redirect_output(log)

    def speak(self, word: str) -> None:
        print(f"printed {word}", flush=True)
        print(f"complained {word}", file=sys.stderr, flush=True)
        os.write(1, f"written {word}\n".encode())
        logging.getLogger("actor").info("logged %s", word)
        logging.getLogger("actor").debug("not logged")

    def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


def start(log: Path) -> Any:
    return ray.remote(Speaker).options(num_cpus=0).remote(log)


@pytest.mark.usefixtures("local_ray")
def test_an_actors_whole_output_is_in_its_log_and_a_second_one_appends(tmp_path: Path) -> None:
    log = log_file(tmp_path / "logs", "worker", 3)
    assert log == tmp_path / "logs" / "worker-3.log"
    first = start(log)
    get(first.speak.remote("one"))
    with pytest.raises(deaths()):
        get(first.die.remote())
    after_death = log.read_text()
    second = start(log)
    get(second.speak.remote("two"))
    text = log.read_text()
    assert text.startswith(after_death)
    for word in ("one", "two"):
        for line in (f"printed {word}", f"complained {word}", f"written {word}"):
            assert line in text.split("\n")
        assert re.search(f"^{STAMP} INFO actor: logged {word}$", text, re.MULTILINE)
    assert "not logged" not in text
    assert tail(log) == f"its log {log} ends with: {text.strip().splitlines()[-1]}"
    assert dead([second, first, second]) == [1]
    ray.kill(second)


def test_the_tail_of_a_log(tmp_path: Path) -> None:
    log = tmp_path / "worker-0.log"
    assert tail(None) == ""
    assert tail(log) == f"its log is {log}"
    log.write_bytes(b"before\n" * 20000 + b"\xff the last\n \n")
    assert tail(log) == f"its log {log} ends with: � the last"
    log.write_text("x" * 100000)
    assert tail(log) == f"its log {log} ends with: {'x' * MAX_LINE}"


def fail(log: Path, word: str) -> None:
    with driver_log(log):
        logging.getLogger("driver").warning("careful %s", word)
        raise RolloutError(word)


def test_the_drivers_log_has_levels_and_the_error_that_ended_the_run(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    log, root = tmp_path / "logs" / "driver.log", logging.getLogger()
    before = root.level, list(root.handlers)
    for word in ("one", "two"):
        with pytest.raises(RolloutError, match=word):
            fail(log, word)
    logging.getLogger("driver").info("too late")
    text = log.read_text()
    for word in ("one", "two"):
        assert re.search(f"^{STAMP} WARNING driver: careful {word}$", text, re.MULTILINE)
        assert re.search(f"^{STAMP} ERROR qarl.logs: the run ends with an error$", text, re.MULTILINE)
        assert f"RolloutError: {word}" in text
    assert "too late" not in text
    assert (root.level, root.handlers) == before
    assert capfd.readouterr() == ("", "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has /dev/full")
def test_a_full_disk_does_not_fill_the_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    with driver_log(Path("/dev/full")):
        logging.getLogger("qarl").info("lost")
    assert capfd.readouterr().err == ""


def test_a_log_line_that_cannot_be_written_otherwise_is_told(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with driver_log(tmp_path / "driver.log"):
        ours = logging.getLogger().handlers[-1]  # pytest's own would raise
        ours.handle(logging.LogRecord("qarl", logging.INFO, "", 0, "%d steps", ("many",), None))
    assert "TypeError: %d format" in capfd.readouterr().err

"""One writer at a time, and files that are whole."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launch.run.files import only_writer, write_whole
from qarl.errors import ConfigError

HOLD = """
import sys, time
from pathlib import Path
from launch.run.files import only_writer
with only_writer(Path(sys.argv[1]), print):
    print("held", flush=True)
    time.sleep(1000)
"""


@pytest.fixture
def other(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that is at work on the run "mine"."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "mine")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_writer_is_refused_with_the_first_ones_host_and_pid(
    tmp_path: Path, other: subprocess.Popen[str]
) -> None:
    message = f"mine: process {other.pid} on {os.uname().nodename} is at work on this run; wait until it has ended"
    with pytest.raises(ConfigError, match=message), only_writer(tmp_path / "mine", print):
        pass
    with only_writer(tmp_path / "yours", print):
        pass
    assert [path.name for path in tmp_path.iterdir()] == [".mine.lock"]


def test_the_lock_of_a_killed_process_is_stale(tmp_path: Path, other: subprocess.Popen[str]) -> None:
    other.send_signal(signal.SIGKILL)
    other.wait()
    said = list[str]()
    own = pytest.raises(ConfigError, match=f"process {os.getpid()} on")
    with only_writer(tmp_path / "mine", said.append), own, only_writer(tmp_path / "mine", print):
        pass
    [line] = said
    assert f"process {other.pid} on {os.uname().nodename} was killed at work on this run" in line
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a fault"), only_writer(tmp_path / "a" / "b" / "mine", print):
        raise ConfigError("a fault")
    assert list(tmp_path.iterdir()) == []


def a_file(folder: Path) -> Path:
    (folder / "file").touch()
    return folder / "file"


@pytest.mark.parametrize(
    "place",
    {
        "a file": a_file,
        "below a file": lambda folder: a_file(folder) / "runs",
        "no real file system": lambda _: Path("/proc/runs"),
        "a long name": lambda folder: folder / ("x" * 300) / "runs",
        "a lone surrogate": lambda folder: folder / "\ud800",
        "a null byte": lambda folder: folder / "a\0b",
        "a link to nothing": lambda folder: (folder / "link").symlink_to("nowhere") or folder / "link" / "runs",
    }.values(),
)
def test_a_place_that_the_file_system_refuses(tmp_path: Path, place: Callable[[Path], Path]) -> None:
    path = place(tmp_path) / "mine"
    with pytest.raises(ConfigError, match=r"cannot be used: .*; change run.dir") as caught, only_writer(path, print):
        pass
    str(caught.value).encode()  # it can be printed
    assert "\n" not in str(caught.value)


def test_a_long_name_of_a_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="File name too long"), only_writer(tmp_path / ("x" * 300), print):
        pass


def test_a_file_that_cannot_be_written_keeps_its_name(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "folder").mkdir()
    for name in ("loop", "folder"):
        with pytest.raises(OSError, match=f"{name}'$"):
            write_whole(tmp_path / name, "text")
    (tmp_path / "link").symlink_to("file")
    write_whole(tmp_path / "link", "text")
    assert (tmp_path / "file").read_text() == "text"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder", "link", "loop"]


def test_a_file_has_its_old_content_or_the_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    write_whole(file, "old")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: 1 / 0)  # the power fails
        with pytest.raises(ZeroDivisionError):
            write_whole(file, "new")
    assert file.read_text() == "old"
    write_whole(file, "new")
    assert file.read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]

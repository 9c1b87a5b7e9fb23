"""Loading a function of the user's own: where it is looked for, and the one line that says what is wrong."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from qarl.errors import ConfigError
from qarl.hooks import check_call, load_function

SOURCE = """
from __future__ import annotations
from dataclasses import dataclass

@dataclass
class Runs:
    count: int = 0

RUNS = Runs()
RUNS.count += 1

def double(x): return 2 * x
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working directory, as the `qarl` script sees it: not on sys.path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    known = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - known:
        del sys.modules[name]


def test_files_and_modules_of_the_working_directory(folder: Path) -> None:
    (folder / "hook_one.py").write_text(SOURCE)
    (folder / "deep").mkdir()
    (folder / "deep" / "hook_two.py").write_text(SOURCE)
    for name in ("hook_one:double", "hook_one.py:double", "deep/hook_two.py:double", f"{folder}/hook_one.py:double"):
        assert load_function(name, "some.key")(21) == 42
    assert load_function("math:sqrt", "some.key")(4.0) == 2.0


def test_a_relative_file_is_found_from_another_directory_by_sys_path(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in an actor on another node: Ray adds the driver's working directory to sys.path."""
    (folder / "hook_one.py").write_text(SOURCE)
    (folder / "elsewhere").mkdir()
    monkeypatch.chdir(folder / "elsewhere")
    monkeypatch.syspath_prepend(str(folder))
    assert load_function("hook_one.py:double", "some.key")(21) == 42


def test_a_file_runs_once_and_hides_no_module(folder: Path) -> None:
    (folder / "random.py").write_text(SOURCE)
    first = load_function("random.py:double", "some.key")
    assert load_function(f"{folder}/random.py:double", "some.key") is first
    assert first.__globals__["RUNS"].count == 1
    import random

    assert random.random() < 1


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("loss", "'loss' names no function; write module:function or path/to/file.py:function"),
        ("mine.py:", "'mine.py:' names no function; write module:function or path/to/file.py:function"),
        ("no/such.py:loss", "no such file: no/such.py; a relative path starts at the working directory"),
        ("no_such_module:loss", "cannot import no_such_module: ModuleNotFoundError: No module named 'no_such_module'"),
        ("broken.py:loss", "cannot import broken.py: ZeroDivisionError: division by zero"),
        ("exits.py:loss", "cannot import exits.py: SystemExit: 3"),
        ("broken:loss", "cannot import broken: ZeroDivisionError: division by zero"),
        ("syntax.py:loss", "cannot import syntax.py: SyntaxError: "),
        ("math:no_such", "math has no attribute 'no_such'; write module:function or path/to/file.py:function"),
        ("math:pi", "math:pi is a float, not a function; write module:function or path/to/file.py:function"),
    ],
)
def test_each_fault_is_one_line_that_names_the_key(name: str, line: str, folder: Path) -> None:
    (folder / "broken.py").write_text("1 / 0\n")
    (folder / "syntax.py").write_text("def loss(:\n")
    (folder / "exits.py").write_text("raise SystemExit(3)\n")
    for _ in range(2):  # a file that failed is not taken for loaded
        with pytest.raises(ConfigError) as caught:
            load_function(name, "some.key")
        assert str(caught.value).startswith(f"some.key: {line}")
        assert "\n" not in str(caught.value)


def test_a_call_is_checked_against_the_signature() -> None:
    def loss(inputs: object, low: float, high: float = 1.0) -> None: ...

    check_call(loss, ["inputs"], {"low": 1}, "some.key")
    for kwargs, reason in [
        ({}, "missing a required argument: 'low'"),
        ({"low": 1, "hihg": 2}, "got an unexpected keyword argument 'hihg'"),
        ({"low": 1, "inputs": 2}, "multiple values for argument 'inputs'"),
    ]:
        with pytest.raises(ConfigError, match=r"some\.key: loss cannot be called as loss\(inputs") as caught:
            check_call(loss, ["inputs"], kwargs, "some.key")
        assert reason in str(caught.value)


def test_the_script_finds_the_working_directory(folder: Path) -> None:
    """A console script has its own folder, not the working directory, at the head of sys.path."""
    (folder / "hook_one.py").write_text(SOURCE)
    (folder / "bin").mkdir()
    script = folder / "bin" / "script.py"
    script.write_text("from qarl.hooks import load_function\nprint(load_function('hook_one:double', 'k')(21))\n")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "42", done.stderr

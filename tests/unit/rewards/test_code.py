"""Programs under limits. Each test runs a few small processes."""

from __future__ import annotations

import ctypes
import json
import os
from typing import Any

import pytest

from qarl.config.reward import CodeSettings
from rewards import sandbox
from rewards.code import Code
from tests.support.rewards import response

ADD = "```python\ndef add(a, b):\n    return a + b\n```"


def can_isolate() -> bool:
    child = os.fork()
    if child == 0:
        os._exit(int(ctypes.CDLL(None).unshare(sandbox.CLONE_NEWUSER | sandbox.CLONE_NEWNET) != 0))
    return os.waitpid(child, 0)[1] == 0


needs_namespaces = pytest.mark.skipif(not can_isolate(), reason="this host permits no network namespaces")


def code(**settings: Any) -> Code:
    settings = {"network": True, "timeout_s": 10.0, **settings}
    return Code(**CodeSettings(**settings).model_dump())


@pytest.mark.parametrize(
    ("program", "reward"),
    [
        (ADD, 1.0),
        (f"```\nwrong\n```\nBetter:\n{ADD}", 1.0),
        ("def add(a, b): return a + b", 1.0),
        ("```python\ndef add(a, b):\n    return a - b\n```", 0.0),
        ("```python\ndef add(a, b) return\n```", 0.0),
        ("```python\nimport sys; sys.exit(0)\n```", 0.0),
        ("```python\nimport os; os._exit(0)\n```", 0.0),
        ("I cannot.", 0.0),
    ],
)
def test_tests_in_python(program: str, reward: float) -> None:
    assert code().judge([response(program, "assert add(2, 3) == 5")]) == [reward]


def test_tests_of_input_and_output() -> None:
    tests = [{"input": "2 3", "output": "5\n"}, {"input": "2 2", "output": "5"}]
    program = response("print(sum(map(int, input().split())))", metadata={"tests": tests})
    assert code(tests="tests").judge([program]) == [0.0]
    assert code(tests="tests", partial=True).judge([program]) == [0.5]
    assert code().judge([response(program.text, json.dumps(tests[:1]))]) == [1.0]


@pytest.mark.parametrize(
    ("limits", "program"),
    [
        ({"timeout_s": 1.0}, "while True: pass"),
        ({"timeout_s": 1.0}, "import time; time.sleep(100)"),
        ({"timeout_s": 1.0}, "import subprocess; subprocess.run(['sleep', '100'])"),
        ({"memory_mib": 128}, "x = bytearray(2**28)"),
        ({}, "open('big', 'wb').write(b'0' * 2**21)"),
        ({}, "print('0' * 2**21)"),
        ({}, "files = [open('/dev/null') for _ in range(100)]"),
    ],
)
def test_limits(limits: dict[str, Any], program: str) -> None:
    """Each program would pass without its limit."""
    assert code(**limits).judge([response(program, "assert True")]) == [0.0]


NETWORK = """
import socket
with socket.create_server(("127.0.0.1", 0)) as server:
    socket.create_connection(server.getsockname()).close()
"""


@needs_namespaces
def test_no_network() -> None:
    isolated = code(network=False)
    isolated.start()
    assert isolated.judge([response(NETWORK, "assert True"), response("x = 1", "assert x")]) == [0.0, 1.0]
    assert code().judge([response(NETWORK, "assert True")]) == [1.0]


def test_the_environment_and_the_folder_of_the_run_are_not_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "1")
    program = "import os\nassert 'SECRET' not in os.environ and os.listdir() == ['program.py']"
    assert code().judge([response(program, "assert True")]) == [1.0]


@pytest.mark.parametrize(("answer", "what"), [("", "no tests"), ("[]", "no tests"), ("assert (", "closed")])
def test_a_row_without_tests_is_refused(answer: str, what: str) -> None:
    with pytest.raises((ValueError, SyntaxError), match=what):
        code().check(response("", answer))


def test_an_interpreter_that_cannot_run_is_told_at_the_start() -> None:
    with pytest.raises(OSError, match="/bin/false cannot run a program"):
        code(python="/bin/false").start()

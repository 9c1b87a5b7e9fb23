"""The environment process: `python child.py FUNCTION SETTINGS TIMEOUT_S FD LOG`, started by `service.py`.

It imports nothing but the standard library: with `environment.python` it runs in another virtual environment, which
has no qarl. FUNCTION (`module:name` or `file.py:name`) called with SETTINGS, in JSON, makes one environment for each
conversation. Over the inherited socket FD go JSON messages, framed as `multiprocessing.connection` does. First the
process says that it is ready (empty bytes), or why it is not. Then it answers each call, in order:

    {"do": "reset", "id": 3, "prompt": {...}}      {"given": ...}
    {"do": "step", "id": 3, "response": "..."}     {"given": ..., "reward": 0.0, "done": false}
    {"do": "end", "id": 3}                         no answer

What an environment raises is answered by {"error": "..."}. The process ends when the socket closes.
"""

from __future__ import annotations

import faulthandler
import functools
import importlib
import importlib.util
import json
import os
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

# The parent kills an environment at its time-out. Only one whose parent is gone lives this much longer.
ORPHAN_GRACE_S = 2.0


def main() -> None:
    """Serve until the parent closes the socket or dies."""
    function, settings, timeout_s, fd, log = sys.argv[1:]
    connection = Connection(int(fd))
    if log:
        opened = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        for output in (1, 2):
            os.dup2(opened, output)
    try:
        make = functools.partial(load(function), **json.loads(settings))
    except BaseException as error:  # noqa: BLE001 - whatever its import raises, the parent reports
        connection.send_bytes(_one_line(error).encode())
        return
    connection.send_bytes(b"")
    open_environments: dict[int, Any] = {}
    try:
        while True:
            call = json.loads(connection.recv_bytes())
            # A watchdog outside of the interpreter: it also ends code that never lets go of the GIL.
            faulthandler.dump_traceback_later(float(timeout_s) + ORPHAN_GRACE_S, exit=True)
            answer = _answer(call, open_environments, make)
            faulthandler.cancel_dump_traceback_later()
            if call["do"] != "end":
                connection.send_bytes(answer)
    except (EOFError, ConnectionError):
        return


def load(function: str) -> Callable[..., Any]:
    """The function or class called `module:name` or `file.py:name`."""
    source, _, name = function.rpartition(":")
    sys.path.append(os.getcwd())
    if not source.endswith(".py"):
        return getattr(importlib.import_module(source), name)
    spec = importlib.util.spec_from_file_location("qarl_environment", source)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["qarl_environment"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


def _answer(call: dict[str, Any], environments: dict[int, Any], make: Callable[[], Any]) -> bytes:
    number = call["id"]
    try:
        if call["do"] == "reset":
            environments[number] = make()
            answer = {"given": environments[number].reset(call["prompt"])}
        elif call["do"] == "step":
            given, reward, done = environments[number].step(call["response"])
            answer = {"given": given, "reward": float(reward), "done": bool(done)}
        else:
            close = getattr(environments.pop(number, None), "close", None)
            answer = {"given": close and close()}
        return json.dumps(answer).encode()
    except BaseException as error:  # noqa: BLE001 - whatever an environment raises costs one sample, not the run
        if sys.argv[-1]:  # without a log the answer alone tells it
            traceback.print_exc()
        return json.dumps({"error": f"raised {_one_line(error)}"}).encode()


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


if __name__ == "__main__":
    main()

"""The verifier process: `python -m rewards.child FUNCTION TIMEOUT_S KWARGS FD LOG`, started by `rewards.service`.

Over the inherited socket FD it says once that it is ready (empty bytes, or why it is not), then answers each chunk of
(text, finish_reason, answer, kwargs of the row) with one (reward, error) per sample, in order. It ends when the socket
closes. FUNCTION is `module:function` or `file.py:function`, KWARGS are in JSON, LOG is a file or empty. Besides the
standard library it imports the verifier, `qarl.hooks`, which finds it, and `qarl.logs`.
"""

import faulthandler
import json
import logging
import sys
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

from qarl.hooks import load_function
from qarl.logs import redirect_output

Verifier = Callable[..., float]

# The parent kills a verifier at its time-out. Only one whose parent is gone lives this much longer.
ORPHAN_GRACE_S = 2.0


def main() -> None:
    """Serve until the parent closes the socket or dies."""
    connection = Connection(int(sys.argv[4]))
    redirect_output(Path(sys.argv[5]) if sys.argv[5] else None)
    try:
        verify: Verifier = partial(load_function(sys.argv[1], "reward.function"), **json.loads(sys.argv[3]))
    except BaseException as error:  # noqa: BLE001 - whatever its import raises, the parent reports
        connection.send_bytes(_one_line(error).encode())
        return
    connection.send_bytes(b"")
    try:
        while True:
            for text, finish_reason, answer, kwargs in connection.recv():
                # A watchdog outside of the interpreter: it also ends code that never lets go of the GIL.
                faulthandler.dump_traceback_later(float(sys.argv[2]) + ORPHAN_GRACE_S, exit=True)
                outcome = _judge(partial(verify, text, finish_reason, answer, **kwargs))
                faulthandler.cancel_dump_traceback_later()
                connection.send(outcome)
    except (EOFError, ConnectionError):
        return


def _judge(verify: Callable[[], float]) -> tuple[float, str]:
    try:
        reward = float(verify())
        if not 0.0 <= reward <= 1.0:
            raise ValueError(f"reward {reward} is not in [0, 1]")
    except BaseException as error:  # whatever a verifier raises costs one sample, not the run
        logging.getLogger("rewards.child").warning("the verifier raised", exc_info=True)
        return 0.0, f"raised {_one_line(error)}"
    return reward, ""


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


if __name__ == "__main__":
    main()

"""The verifier process: `python -m rewards.child COMPONENTS TIMEOUT_S FD LOG`, started by `rewards.service`.

Over the inherited socket FD it says once that it is ready (empty bytes, or why it is not), then answers each unit of a
message, in order. It ends when the socket closes. COMPONENTS is a JSON list of [kind, settings], LOG a file or empty.
"""

import faulthandler
import json
import logging
import math
import sys
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path

from qarl.logs import redirect_output
from rewards.component import Component, Response
from rewards.kinds import make

# The parent kills a verifier at its time-out. Only one whose parent is gone lives this much longer.
ORPHAN_GRACE_S = 2.0
Judged = list[tuple[float, str]]
"""One (reward, error) a response."""


def main() -> None:
    """Serve until the parent closes the socket or dies."""
    connection = Connection(int(sys.argv[3]))
    redirect_output(Path(sys.argv[4]) if sys.argv[4] else None)
    try:
        components = [make(kind, settings) for kind, settings in json.loads(sys.argv[1])]
        for component in components:
            component.start()
    except BaseException as error:  # noqa: BLE001 - whatever its import raises, the parent reports
        connection.send_bytes(_one_line(error).encode())
        return
    connection.send_bytes(b"")
    try:
        while True:
            for action, numbers, responses in connection.recv():
                # A watchdog outside of the interpreter: it also ends code that never lets go of the GIL.
                faulthandler.dump_traceback_later(float(sys.argv[2]) * len(responses) + ORPHAN_GRACE_S, exit=True)
                act = _judge if action == "judge" else _check
                outcome = [act(components[number], responses) for number in numbers]
                faulthandler.cancel_dump_traceback_later()
                connection.send(outcome)
    except (EOFError, ConnectionError):
        return


def _judge(component: Component, responses: Sequence[Response]) -> Judged:
    try:
        rewards: list[float | BaseException] = list(component.judge(responses))
        if len(rewards) != len(responses):
            raise ValueError(f"{len(rewards)} rewards for {len(responses)} responses")
    except BaseException as error:  # noqa: BLE001 - whatever a verifier raises costs its samples, not the run
        rewards = [error] * len(responses)
    return [_finite(reward) for reward in rewards]


def _finite(reward: float | BaseException) -> tuple[float, str]:
    try:
        if isinstance(reward, BaseException):
            raise reward
        if not math.isfinite(float(reward)):
            raise ValueError(f"reward {reward} is not finite")
    except BaseException as error:  # what a verifier raised, or the conversion of what it returned
        logging.getLogger("rewards.child").warning("the verifier raised", exc_info=True)
        return 0.0, f"raised {_one_line(error)}"
    return float(reward), ""


def _check(component: Component, responses: Sequence[Response]) -> Judged:
    """The errors say why the answers of rows cannot be judged by."""
    errors = []
    for response in responses:
        try:
            component.check(response)
            errors.append("")
        except Exception as error:  # noqa: BLE001 - parsers raise anything
            errors.append(" ".join(str(error).split())[:300] or type(error).__name__)
    return [(0.0, error) for error in errors]


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


if __name__ == "__main__":
    main()

"""What trainer and rollout share about Ray.

The one file of qarl that names Ray, and it imports Ray inside its functions only.
"""

import atexit
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from random import SystemRandom
from select import select
from threading import Thread, main_thread
from time import sleep
from types import FrameType
from typing import Any

from qarl.errors import AGAIN, LACK_OF_MEMORY, ActorError, QarlError, how_ended

KNOWN_S = 5.0
REPEAT_S = 5.0
"""The death of Ray's raylet is an error again and again, so long apart, until it ends the main thread."""
GUARD = """
read ended
[ "$ended" ] || echo "$1" >&2
exec 2>/dev/null
for pause in 1 0; do  # the raylet may just have started one
    for p in $(find /proc/[0-9]*/fd -lname "*$0" | cut -d/ -f3 | sort -u); do
        grep -qai agent /proc/$p/cmdline && kill -9 $p
    done
    sleep $pause
done
"""


def get(refs: Any, timeout_s: float | None = None) -> Any:
    """`ray.get`, but a QarlError comes as the actor raised it; its `__cause__` shows the actor's traceback.

    Raises:
        QarlError: the actor raised it.
        ActorError: the actor raised anything else.
        RayError: everything else, as `ray.get` does; see `deaths`.
    """
    import ray
    from ray.exceptions import RayTaskError

    try:
        return ray.get(refs, timeout=timeout_s)
    except RayTaskError as error:
        if isinstance(error.cause, QarlError):
            raise error.cause from error
        reason = " ".join(str(error.cause).split()) or "no reason given"
        raise ActorError(f"{type(error.cause).__name__}: {reason:.300}") from error


def deaths() -> tuple[type[Exception], ...]:
    """What Ray raises for an actor whose process is gone."""
    from ray.exceptions import NodeDiedError, ObjectLostError, OutOfMemoryError, RayActorError

    return RayActorError, OutOfMemoryError, NodeDiedError, ObjectLostError


def how_it_died(error: Exception) -> str:
    """How the process of an actor ended, as far as one of `deaths` knows."""
    from ray.exceptions import NodeDiedError, ObjectLostError, OutOfMemoryError

    detail = str(error)
    if isinstance(error, NodeDiedError | ObjectLostError):  # a result that lay on it is lost with it
        return "its node is gone"
    if isinstance(error, OutOfMemoryError):
        return "was killed by Ray for lack of memory"
    if "SIGTERM" in detail:
        return how_ended(-signal.SIGTERM)
    if code := re.search(r"exit code (\d+)", detail):
        return how_ended(int(code[1]))
    # Ray does not know of other signals: it sees the end of a connection.
    return f"was killed or crashed, {LACK_OF_MEMORY}" if "End of file" in detail else type(error).__name__


def dead(actors: Sequence[Any]) -> list[int]:
    """Numbers of those `actors` whose process is known to be gone within `KNOWN_S`."""
    import ray

    calls = [actor.__ray_ready__.remote() for actor in actors]
    ended, _ = ray.wait(calls, num_returns=len(calls), timeout=KNOWN_S)
    gone = []
    for call in ended:
        try:
            ray.get(call)
        except deaths():
            gone.append(calls.index(call))
    return sorted(gone)


def as_they_end(refs: Sequence[Any], timeout_s: float | None = None) -> Iterator[Any]:
    """Yield each of `refs` as soon as its call has ended: when one fails, others may wait for it forever.

    Raises GetTimeoutError: no call ended within `timeout_s`.
    """
    import ray
    from ray.exceptions import GetTimeoutError

    running = list(refs)
    while running:
        ended, running = ray.wait(running, num_returns=1, timeout=timeout_s)
        if not ended:
            raise GetTimeoutError(f"no call ended within {timeout_s:g} s")
        yield ended[0]


def guard(log: str) -> None:
    """Have a shell wait for the end of this process, however it comes; call it before Ray starts.

    It kills Ray's agents. They would see the end themselves, but first report it to Ray's head, which is gone as well,
    for a minute. It prints a line if this process could not: it was killed, or Ray has ended it as it does when an
    object cannot be put because the raylet has died (`connection.cc`: "Terminate the process").

    Args:
        log: the end of the path of a file that these agents hold open, and those of no other process's Ray.
    """
    line = f"qarl: the driver was killed, or ended by Ray because its raylet has died; {AGAIN}"
    # This process alone holds the other end of its input; a session of its own, because Ctrl-C is not for it.
    theirs, ours = os.pipe()
    command = ["sh", "-c", GUARD, log, line]
    shell = subprocess.Popen(command, stdin=theirs, stdout=subprocess.DEVNULL, start_new_session=True)
    os.close(theirs)
    atexit.register(_end, shell, ours)


def _end(shell: "subprocess.Popen[bytes]", pipe: int) -> None:
    """Tell the guard that this process ends by itself."""
    if shell.poll() is None:
        os.write(pipe, b"ended\n")


def raise_when_gone(raylet: int) -> None:
    """Raise QarlError in the main thread as soon as the process `raylet` ends, unless Ray is shut down by then.

    Else Ray's next call would end this process without a word, or wait for an actor that nothing starts any more. The
    error may come anywhere, also where Python or a library drops it (`__del__`, a handler of logging, `except
    Exception`): it comes again every `REPEAT_S`, but not while the code that it has ended closes what it holds.
    """
    import ray

    def watch() -> None:
        select([ended], [], [])
        os.close(ended)
        while ray.is_initialized() and main_thread().is_alive():
            os.kill(os.getpid(), signal.SIGUSR2)
            sleep(REPEAT_S)

    def fail(number: int, frame: FrameType | None) -> None:
        handled = sys.exception()
        while handled:
            if handled is error:
                return
            handled = handled.__context__
        raise error.with_traceback(None)

    error = QarlError("Ray's raylet has died", hint=AGAIN)
    ended = os.pidfd_open(raylet)
    signal.signal(signal.SIGUSR2, fail)
    Thread(target=watch, daemon=True).start()


LISTENING_PORTS = range(20000, 32768)
"""Above those of Ray's workers, and below those that Linux gives to connections: nobody takes one in the meantime."""


def free_address() -> str:
    """ "host:port" of this node, a port that nothing listens on yet."""
    import ray

    host = ray.util.get_node_ip_address()
    for port in SystemRandom().sample(LISTENING_PORTS, len(LISTENING_PORTS)):
        with suppress(OSError), socket.socket() as probe:
            probe.bind(("", port))
            return f"{host}:{port}"
    raise QarlError("no port is free on this machine", host)

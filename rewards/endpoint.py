"""JSON over HTTP with retries: what a teacher, a judge and an http reward have in common."""

import json
import os
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from typing import Any
from urllib.parse import urlsplit

from qarl.errors import ConfigError

FIRST_PAUSE_S = 1.0
"""Before the first retry; each further pause is twice as long, up to LONGEST_PAUSE_S."""
LONGEST_PAUSE_S = 60.0
TRY_AGAIN = {408, 429}
"""Statuses that may change with time, as those from 500 on."""


class Rejected(Exception):
    """The endpoint refuses the request with this status, and would again."""

    def __init__(self, status: int) -> None:
        super().__init__(f"status {status}")
        self.status = status


class Unreachable(Exception):
    """No try has brought an answer."""


def _sleep(seconds: float) -> bool:
    time.sleep(seconds)
    return False


class Endpoint:
    """Posts JSON to `url`.

    Args:
        key_variable: environment variable with the key; empty sends none.
        where: the config key that holds its name, for errors.

    Raises ConfigError: the variable is not set, or does not hold a key.
    """

    def __init__(self, url: str, key_variable: str, timeout_s: float, max_retries: int, where: str) -> None:
        self.url, self._timeout_s, self._max_retries = url, timeout_s, max_retries
        self._headers = {"Content-Type": "application/json"}
        if key_variable:
            self._headers["Authorization"] = f"Bearer {api_key(key_variable, where)}"

    def post(self, body: Any, is_over: Callable[[float], bool] = _sleep) -> bytes:
        """The reply to `body`. Raises Rejected or Unreachable.

        Args:
            is_over: waits for so many seconds before a try; true gives up.
        """
        fault = "closed"
        request = urllib.request.Request(self.url, json.dumps(body).encode(), self._headers)
        pauses = (min(FIRST_PAUSE_S * 2.0**i, LONGEST_PAUSE_S) for i in range(self._max_retries))
        for pause in [0.0, *pauses]:
            if is_over(pause):
                break
            try:
                with urllib.request.urlopen(request, timeout=self._timeout_s) as response:
                    return bytes(response.read())
            except urllib.error.HTTPError as error:
                fault = f"status {error.code}"
                if error.code < 500 and error.code not in TRY_AGAIN:
                    raise Rejected(error.code) from error
            except (OSError, HTTPException) as error:  # time-outs and lost connections
                fault = f"{type(error).__name__}: {error}"
        raise Unreachable(fault)

    def check_reachable(self) -> None:
        """Raises ConfigError: nobody accepts a connection."""
        parts = urlsplit(self.url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
        try:
            socket.create_connection((parts.hostname or "", port), timeout=min(self._timeout_s, 10.0)).close()
        except OSError as error:
            raise ConfigError(
                f"nobody answers at {parts.hostname}:{port} ({error})", self.url, "start it first"
            ) from error


def at_once(call: Callable[[Any], float], items: Sequence[Any]) -> list[float | BaseException]:
    """`call` of every item, in threads: its value, or what it raised."""
    with ThreadPoolExecutor(len(items)) as pool:
        futures = [pool.submit(call, item) for item in items]
    return [future.exception() or future.result() for future in futures]


def chat_url(base_url: str) -> str:
    return f"{base_url.rstrip('/')}/chat/completions"


def chat_text(reply: bytes) -> str:
    """The text of a chat completion; "" when it was cut short. Raises ValueError: `reply` is none."""
    try:
        return str(json.loads(reply)["choices"][0]["message"]["content"] or "")
    except (ValueError, KeyError, IndexError, TypeError, RecursionError) as error:
        raise ValueError(f"its reply is not a chat completion ({error!r})") from error


def api_key(variable: str, where: str) -> str:
    """The key in an environment variable. Raises ConfigError that names `where`."""
    if variable not in os.environ:
        raise ConfigError(f"{variable} is not set", where, hint="export it, or name another variable")
    key = os.environ[variable]
    if not key or not key.isascii() or not key.isprintable():
        what = f"{variable} is empty, or has a line end or other characters that no key has"
        raise ConfigError(what, where, hint="export the key alone")
    return key

"""An OpenAI-compatible endpoint of this process that fails as it is told."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

WAIT_S = 20.0


def completion(text: str | None) -> bytes:
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()


@contextmanager
def serving() -> Iterator[Stub]:
    """A server that runs."""
    server = Stub()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


class Stub(ThreadingHTTPServer):
    """Answers each question (or response to be judged) from `plans`, one entry a request: a status, a body, or an event
    to wait for first."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.plans: dict[str, list[int | bytes | threading.Event]] = {}
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.lock = threading.Lock()

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that has gone is no news."""


class Handler(BaseHTTPRequestHandler):
    server: Stub

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        question = body["messages"][0]["content"] if "messages" in body else body["response"]
        with self.server.lock:
            self.server.bodies.append(body)
            self.server.headers.append(dict(self.headers))
            self.server.paths.append(self.path)
            plan = self.server.plans.get(question, [])
            step = plan.pop(0) if plan else completion(r"\boxed{42}")
        if isinstance(step, threading.Event):
            step.wait(WAIT_S)
            step = completion(r"\boxed{late}")
        self.send_response(step if isinstance(step, int) else 200)
        self.end_headers()
        self.wfile.write(step if isinstance(step, bytes) else b"")

    def log_message(self, format: str, *args: object) -> None:
        pass

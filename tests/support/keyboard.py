"""A page in a headless Chromium that is used by its keys alone, over the devtools protocol."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any, Self

from tests.support.browser import program

CODES = {"Tab": 9, "Enter": 13, "Escape": 27, " ": 32, "End": 35, "Home": 36}
CODES |= {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}
TEXTS = {"Enter": "\r"}
READY_S = 100.0


class Keyboard:
    """The page, shown; as a context manager. Skips the test where there is no Chromium."""

    def __init__(self, page: Path, width: int = 1400, dark: bool = False) -> None:
        read, self._write = os.pipe()
        self._read, write = os.pipe()
        inside = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (read, write)]  # above 3 and 4, which the shell sets
        flags = ["--no-sandbox", "--headless", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-pipe"]
        flags += [f"--user-data-dir={page.parent / 'keyboard'}"]
        command = ["bash", "-c", f'exec "$@" 3<&{inside[0]} 4>&{inside[1]}', "bash", program(), *flags]
        self._process = subprocess.Popen(command, pass_fds=inside, stderr=subprocess.DEVNULL)
        for end in (read, write, *inside):
            os.close(end)
        self._numbers, self._buffer, self._session = 0, b"", ""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=page.absolute().as_uri())
        self.until("document.documentElement?.dataset.ready")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._write)
        os.close(self._read)

    def call(self, method: str, **params: Any) -> Any:
        """The result of a call of the protocol."""
        self._numbers += 1
        message = {"id": self._numbers, "method": method, "params": params}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self._buffer:
                got = os.read(self._read, 2**20)
                assert got, "Chromium has ended"
                self._buffer += got
            line, _, self._buffer = self._buffer.partition(b"\0")
            answer = json.loads(line)
            if answer.get("id") == self._numbers:
                assert "error" not in answer, answer
                return answer["result"]

    def press(self, *keys: str) -> None:
        for key in keys:
            code = CODES.get(key, ord(key[0].upper()))
            event = {"key": key, "windowsVirtualKeyCode": code}
            text = TEXTS.get(key, key if len(key) == 1 else "")
            self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **event)
            self.call("Input.dispatchKeyEvent", type="keyUp", **event)

    def ask(self, expression: str) -> Any:
        """The value of an expression in the page."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def until(self, expression: str) -> None:
        """Wait until `expression` is true: a chart draws at its next frame."""
        deadline = time.monotonic() + READY_S
        while not self.ask(expression):
            assert time.monotonic() < deadline, f"not so: {expression}"
            time.sleep(0.1)

    def tab_to(self, expression: str, most: int = 200) -> None:
        """Press Tab until `expression` is true of the element that has the focus, `one`."""
        for _ in range(most):
            self.press("Tab")
            if self.ask(f"(one => {expression})(document.activeElement)"):
                return
        raise AssertionError(f"Tab does not reach {expression}")

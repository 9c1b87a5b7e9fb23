"""Pages in a real headless Chromium."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

from tests.support.needs import lacking

NAMES = ("chromium-headless-shell", "chromium", "google-chrome")


def program() -> str:
    """The Chromium of this machine. Skips the test where there is none."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        lacking(f"no Chromium ({', '.join(NAMES)}): apt install {NAMES[0]}")
    return found


def look(page: Path, script: str, width: int = 1400, dark: bool = False) -> dict[str, Any]:
    """What `script` puts into the object `found`, run in the loaded page. `found.errors` has what the page throws.

    Skips the test where there is no Chromium.
    """
    text = page.read_text()
    first = "<script>const errors = []; window.onerror = (message) => { errors.push(message) }</script>"
    last = (
        f"<script>const found = {{}}; {script}; found.errors = errors; const shown = document.createElement('pre'); "
        "shown.id = 'found'; shown.textContent = JSON.stringify(found); document.body.append(shown)</script>"
    )
    copy = page.with_name(f"looked-at-{page.name}")
    head, body, rest = text.rpartition("</body>")  # the charting library has such a text, too
    copy.write_text(head.replace("<head>", f"<head>{first}", 1) + last + body + rest)
    flags = ["--no-sandbox", "--headless", "--disable-gpu", f"--window-size={width},900", "--virtual-time-budget=5000"]
    flags += ["--blink-settings=preferredColorScheme=0"] * dark
    command = [program(), *flags, f"--user-data-dir={page.parent / 'browser'}", "--dump-dom", copy.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    match = re.search(r'<pre id="found">(.*?)</pre>', dom, re.DOTALL)
    assert match, dom[-500:]
    return dict(json.loads(html.unescape(match[1])))

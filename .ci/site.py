"""What mkdocs needs besides docs/: the pages at the root of the repository, and the reference of the config keys."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

from qarl.config.io import documentation

ROOT = Path(__file__).parents[1]
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "CONTRIBUTING.md", "SECURITY.md": "SECURITY.md"}
PAGES["CHANGELOG.md"] = "CHANGELOG.md"


def on_files(files: Files, config: Any) -> Files:
    for source, target in PAGES.items():
        text = re.sub(r"\]\(docs/", "](", (ROOT / source).read_text())
        files.append(File.generated(config, target, content=text))
    files.append(File.generated(config, "config.md", content=reference()))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links to the pages at the root, which lie beside the others here."""
    return re.sub(r"\]\((?:\.\./)*(README|CONTRIBUTING|SECURITY|CHANGELOG)\.md", _link, markdown)


def _link(match: re.Match[str]) -> str:
    return f"]({PAGES[match[1] + '.md']}"


def reference() -> str:
    """Every key of a config with its default and meaning, a table for each section."""
    text = "# Config keys\n\nWhat `qarl config keys` prints. `a.b=c` on the command line sets one.\n"
    section = ""
    for key, default, meaning in documentation():
        if key.partition(".")[0] != section:
            section = key.partition(".")[0]
            text += f"\n## {section}\n\n| key | default | meaning |\n|---|---|---|\n"
        text += (
            "| " + " | ".join(_cell(part) for part in (f"`{key}`", f"`{default}`" if default else "", meaning)) + " |\n"
        )
    return text


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())

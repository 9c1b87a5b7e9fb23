"""Runs the commands that README and docs show, in a fresh clone: `python -m tests.docs_check [--only WORDS]`.

`tests/support/pages.py` says which are run, which are only parsed (by the suite, too), and which are left out and why.
With --venv the clone uses an existing environment instead of `make setup`.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.support.pages import PAGES, ROOT, commands, rule_of

FIRST = "qarl train quickstart"
"""Later commands look at this run."""
LONGEST_S = 1800
"""Of one command; one that takes longer hangs."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="commands that contain this")
    parser.add_argument("--venv", type=Path, help="an environment, so that nothing is installed")
    args = parser.parse_args()
    found = list(dict.fromkeys(command for page in PAGES for command in commands(page)))
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "qarl"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        if args.venv:
            (clone / ".venv").symlink_to(args.venv.resolve())
        else:
            subprocess.run(["make", "setup"], cwd=clone, check=True)
        chosen = [command for command in found if rule_of(command).kind == "run" and args.only in command]
        if any(re.search("runs/quickstart|qarl runs", command) for command in chosen):
            failed += [] if _run(FIRST, clone) else [FIRST]
        failed += [command for command in chosen if not _run(command, clone)]
    for command in found:
        rule = rule_of(command)
        if rule.kind != "run":
            print(f"{rule.kind}  {command}  ({rule.change})")
    print(f"{len(chosen)} run, {len(failed)} failed; {len(found) - len(chosen)} not run")
    return 1 if failed else 0


def _run(shown: str, clone: Path) -> bool:
    """Whether the command succeeds, as its rule changes it, and prints what the rule says; else its output is shown."""
    rule = rule_of(shown)
    command = f"{shown} {rule.change}".strip()
    path = f"{clone / '.venv' / 'bin'}:{os.environ['PATH']}"
    start = time.monotonic()
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=clone,
        env=os.environ | {"PATH": path, "PYTHONPATH": str(clone)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LONGEST_S,
    )
    is_right = done.returncode == 0 and bool(re.search(rule.shows, done.stdout))
    print(f"{'ok' if is_right else 'FAILED'}  {time.monotonic() - start:4.0f} s  {command}", flush=True)
    if not is_right:
        print(f"{done.stdout[-3000:]}\nexit code {done.returncode}; it must print {rule.shows!r}")
    return is_right


if __name__ == "__main__":
    sys.exit(main())

"""Runs the commands that README and docs show, in a fresh clone: `python -m tests.docs_check [--only WORDS]`.

`tests/support/pages.py` says which are run, which are only parsed (by the suite, too), and which are left out and why.
With --venv the clone uses an existing environment instead of `make setup`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.support.pages import PAGES, ROOT, SMALL, commands, rule_of

FIRST = f"qarl train quickstart {SMALL}"
"""Later commands look at this run."""


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
        if any("runs/quickstart" in command for command in chosen) and not _run(FIRST, clone):
            failed.append(FIRST)
        for command in chosen:
            if not _run(f"{command} {rule_of(command).change}".strip(), clone):
                failed.append(command)
    for command in found:
        rule = rule_of(command)
        if rule.kind != "run":
            print(f"{rule.kind}  {command}  ({rule.change})")
    print(f"{len(chosen)} run, {len(failed)} failed; {len(found) - len(chosen)} not run")
    return 1 if failed else 0


def _run(command: str, clone: Path) -> bool:
    """Whether it succeeds; what it printed when it does not."""
    path = f"{clone / '.venv' / 'bin'}:{os.environ['PATH']}"
    start = time.monotonic()
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=clone,
        env=os.environ | {"PATH": path, "PYTHONPATH": str(clone)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    print(f"{'ok' if done.returncode == 0 else 'FAILED'}  {time.monotonic() - start:4.0f} s  {command}", flush=True)
    if done.returncode:
        print(done.stdout[-3000:])
    return done.returncode == 0


if __name__ == "__main__":
    sys.exit(main())

"""List the runs in a folder: state, step, held-out accuracy, and when each last logged."""

import argparse
from pathlib import Path

from launch.arguments import path

EXAMPLES = """\
  qarl runs
  qarl runs runs/studies --json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", nargs="?", type=path, default=Path("runs"), help="folder of runs (default: runs)")
    parser.add_argument("--json", action="store_true", help="print a JSON object for each run")


def run(args: argparse.Namespace) -> int:
    import json
    from dataclasses import asdict

    from launch.run.listing import find_runs, render_runs
    from launch.run.terminal import console
    from qarl.errors import UsageError

    if not args.folder.is_dir():
        raise UsageError(
            "is no folder", str(args.folder), "name the folder that holds the runs, run.dir of their configs"
        )
    found = find_runs(args.folder)
    if args.json:
        for one in found:
            print(json.dumps(asdict(one)))
    else:
        console().print(render_runs(found))
    return 0

"""Check this machine: packages, processor, GPUs, memory, disk, Ray, W&B.

Each line is good, a warning, or bad, and says what to do. The exit code is 2 when a line is bad."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from launch.arguments import path
from qarl.errors import UsageError

EXAMPLES = """\
  qarl doctor
  qarl doctor --dir /data/runs --json"""
STYLES = {"good": "green", "warning": "yellow", "bad": "red"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dir", type=path, default=Path("runs"), help="where runs are written (default: runs)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Print the findings; 2 when one of them is bad."""
    from rich.console import Console
    from rich.text import Text

    from launch.doctor import examine

    findings = list(examine(args.dir))
    if args.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        for finding in findings:
            line = Text.assemble((f"{finding.grade:8s}", STYLES[finding.grade]), str(finding))
            Console().print(line, soft_wrap=True)
    return UsageError.exit_code if any(finding.grade == "bad" for finding in findings) else 0

"""Print the summary of a finished run, and write its report and curves again."""

import argparse
from pathlib import Path

EXAMPLES = """\
  qarl report runs/quickstart"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", metavar="RUN", type=Path, help="folder of the run")


def run(args: argparse.Namespace) -> int:
    from rich.console import Console

    from launch.run.report import read_summary, render_summary, write_report

    summary = read_summary(args.run_dir)
    write_report(args.run_dir, summary)
    Console().print(render_summary(summary))
    return 0

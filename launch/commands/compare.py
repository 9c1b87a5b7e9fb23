"""Show runs side by side, also while they go on: how far each got, its figures, and the settings in which they differ.

The page with their curves, which `qarl report` writes for several runs, is written, too."""

import argparse

from launch.commands import report

EXAMPLES = """\
  qarl compare runs/quickstart runs/gspo
  qarl compare runs/studies/tbpo/* --out tbpo.html"""

add_arguments = report.add_arguments


def run(args: argparse.Namespace) -> int:
    from launch.run.comparison import compare, render_comparison
    from launch.run.terminal import console
    from qarl.errors import UsageError

    if len(args.run_dirs) < 2:
        raise UsageError("is one run alone", str(args.run_dirs[0]), "name the runs to compare it with")
    shown = console()
    shown.print(render_comparison(compare(args.run_dirs), shown.width))
    return report.run(args)

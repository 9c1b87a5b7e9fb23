"""Write the report of a run again, or one page that shows several runs side by side, also while they go on.

For one run that has ended it also prints the summary and makes the curves again."""

import argparse

from launch.arguments import out_file, path

EXAMPLES = """\
  qarl report runs/quickstart
  qarl report runs/first runs/second --out comparison.html"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dirs", metavar="RUN", nargs="+", type=path, help="folder of a run")
    parser.add_argument(
        "--out",
        metavar="FILE",
        type=out_file,
        help="the page (default: report.html in the folder of the run; of several, comparison.html beside the first)",
    )


def run(args: argparse.Namespace) -> int:
    from launch.run.report import REPORT_FILE, final_summary, render_summary, write_page, write_report
    from launch.run.terminal import console

    summaries = [final_summary(run_dir) for run_dir in args.run_dirs]
    first, out = args.run_dirs[0], args.out
    if len(args.run_dirs) == 1 and summaries[0]:
        write_report(first, summaries[0])
        console().print(render_summary(summaries[0]))
    if out or len(args.run_dirs) > 1 or not summaries[0]:
        out = out or (first.parent / "comparison.html" if len(args.run_dirs) > 1 else first / REPORT_FILE)
        write_page(args.run_dirs, out, summaries)
        print(out)
    return 0

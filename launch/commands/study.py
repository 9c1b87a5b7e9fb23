"""Run the arms of an experiment, each with several seeds, and write a report that compares them."""

import argparse
from pathlib import Path

from launch.arguments import path, path_text
from qarl.config.shipped import config_path

EXAMPLES = """\
  qarl study tbpo --seeds 0 1
  qarl study my_study.yaml --arms naive exact
  qarl study pool --report-only"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("name", type=path_text, help="a YAML file, or the name of a file in configs/study")
    add("--seeds", type=int, nargs="+", default=[], help="seeds of each arm (default: those of the file)")
    add("--arms", nargs="+", default=[], metavar="ARM", help="arms to run (default: all)")
    add("--out", metavar="FOLDER", type=path, help="folder of the report (default: runs/studies/NAME)")
    add("--report-only", action="store_true", help="run nothing; report the runs that exist")


def run(args: argparse.Namespace) -> int:
    from launch.early import check_input
    from launch.tools.study.arms import RUNS, has_ended, load_study, plan, results, run_study
    from launch.tools.study.report import write_study_report
    from qarl.errors import ConfigError

    study = load_study(config_path(args.name, "study"), args.arms, args.seeds)
    runs, out = plan(study), args.out or Path(RUNS, study.name)
    try:
        out.mkdir(parents=True, exist_ok=True)  # now, and not after hours
    except OSError as error:
        raise ConfigError(f"cannot be made: {error.strerror}", f"--out {out}", "name a folder") from error
    if not args.report_only:
        for run in (run for run in runs if not has_ended(run)):
            check_input(run.config)
        run_study(runs)
    found = list(results(runs))
    print(f"report: {write_study_report(study, runs, found, out)}")
    return int(any(result.status == "failed" for result in found))

"""Run a config with every combination of the values that settings list, one run after the other, and compare them.

The sweep becomes a study, runs/studies/NAME/NAME.yaml. What has ended is not run again: the same command continues."""

import argparse

from launch.arguments import add_config, name, path
from launch.commands import study
from qarl.config.shipped import config_path

EXAMPLES = """\
  qarl sweep quickstart learner.optimizer.lr=5e-5,1e-4 train.group_size=4,8 train.steps=20
  qarl sweep my_config.yaml objective.kind=gspo,tbpo --seeds 0 1 2"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    add = parser.add_argument
    add("--seeds", type=int, nargs="+", default=[0], help="seeds of each combination (default: 0)")
    add("--name", type=name, help="of the sweep (default: sweep-CONFIG)")
    add("--out", metavar="FOLDER", type=path, help="folder of the report (default: runs/studies/NAME)")
    add("--report-only", action="store_true", help="run nothing; report the runs that exist")


def run(args: argparse.Namespace) -> int:
    from launch.tools.study.grid import write_grid

    base = config_path(args.config)
    args.name = str(write_grid(base, args.overrides, args.name or f"sweep-{base.stem}", args.seeds))
    args.arms, args.seeds = [], []  # those of the file
    return study.run(args)

"""Run the training run that a config describes, or continue it from its last checkpoint.

With --dry-run, check everything that can be checked before a start, show what would run where, and start nothing."""

import argparse
import os
from typing import TYPE_CHECKING

from launch.arguments import add_config, read_config
from launch.cluster.token import confine_own_ray, read_token

if TYPE_CHECKING:
    from qarl.config.run import Config

EXAMPLES = """\
  qarl train quickstart
  qarl train quickstart train.steps=10 seed=1 run.name=short
  qarl train my_config.yaml --dry-run"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    parser.add_argument("--dry-run", action="store_true", help="check the run and show its placement; start nothing")
    said = parser.add_mutually_exclusive_group()
    said.add_argument("--quiet", action="store_const", const="quiet", dest="verbosity", help="show warnings only")
    said.add_argument(
        "--verbose",
        action="store_const",
        const="verbose",
        dest="verbosity",
        help="show each step's phases and what the libraries log, and no live view",
    )
    parser.set_defaults(verbosity="normal")


def run(args: argparse.Namespace) -> int:
    from launch.early import check_input, check_run_folder

    config = read_config(args)
    check_input(config)
    check_run_folder(config.run.folder)
    _ray_environment(config)
    if args.dry_run:
        from launch.dry_run import dry_run

        return dry_run(config)
    from launch.train import train  # late: torch and ray are slow to import, and a bad config needs neither

    train(config, (lambda line: None) if args.verbosity == "quiet" else print, args.verbosity)
    return 0


def _ray_environment(config: "Config") -> None:
    """Ray reads these once, when it is imported."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # keep CPU actors' view of accelerators
    if config.cluster.address is None:
        confine_own_ray()
    elif read_token():
        os.environ.setdefault("RAY_AUTH_MODE", "token")

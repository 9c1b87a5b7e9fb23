"""Run a config on a Ray cluster as a job: it goes on when the terminal is closed."""

import argparse

from launch.arguments import add_config
from qarl.config.shipped import config_path

EXAMPLES = """\
  qarl submit my_config.yaml --address http://head:8265
  qarl submit quickstart train.steps=10 --address http://head:8265 --no-wait"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    parser.add_argument("--address", required=True, help="dashboard of the cluster's head, such as http://host:8265")
    parser.add_argument("--no-wait", action="store_true", help="return once the job is accepted")


def run(args: argparse.Namespace) -> int:
    from launch.cluster.jobs import submit

    return submit(str(config_path(args.config)), args.overrides, args.address, wait=not args.no_wait)

"""Download and convert the pretrained model that a config names with `model.fetch`; `qarl train` does so by itself."""

import argparse

from launch.arguments import add_config, read_config
from qarl.errors import ConfigError

EXAMPLES = """\
  qarl fetch smollm2_chain_sum
  qarl fetch smollm2_chain_sum model.path=models/smollm2"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)


def run(args: argparse.Namespace) -> int:
    config = read_config(args)
    if config.model.fetch is None:
        raise ConfigError("not set, so there is nothing to download", "model.fetch", "see docs/real_model.md")
    from launch.demo.pretrained import fetch_missing

    fetch_missing(config, print)
    print(config.model.path)
    return 0

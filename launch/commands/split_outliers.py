"""Write a model whose outlier channels are split in two: it computes the same, with flatter weights."""

import argparse

from launch.arguments import path, positive_int

EXAMPLES = """\
  qarl split-outliers models/qwen models/qwen-split --channels 128"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", type=path, help="a Hugging Face model folder")
    parser.add_argument("out", metavar="OUT", type=path, help="a new folder for the model")
    parser.add_argument("--channels", type=positive_int, required=True, help="number of channels to split in every MLP")


def run(args: argparse.Namespace) -> int:
    from launch.tools.split import split

    print(split(args.model, args.out, args.channels))
    return 0

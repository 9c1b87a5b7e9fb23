"""Write a run's newest checkpoint as a Hugging Face folder, after vLLM has sampled the same from it bit for bit."""

import argparse

from launch.arguments import add_formats, path, schemes

EXAMPLES = """\
  qarl export runs/quickstart exported
  qarl export runs/quickstart plain --format none"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", metavar="RUN", type=path, help="folder of the run")
    parser.add_argument("out", metavar="OUT", type=path, help="a new folder for the model")
    add_formats(parser.add_argument, "--format", "format of the weights (default: that of the rollouts)")


def run(args: argparse.Namespace) -> int:
    from launch.tools.export import export

    print(export(args.run_dir, args.out, None if args.format is None else schemes()[args.format]))
    return 0

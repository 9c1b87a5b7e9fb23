"""Write a run's newest checkpoint as a Hugging Face folder, after vLLM has sampled the same from it bit for bit."""

import argparse

from launch.arguments import path, schemes

EXAMPLES = """\
  qarl export runs/quickstart exported
  qarl export runs/quickstart plain --format none"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", metavar="RUN", type=path, help="folder of the run")
    parser.add_argument("out", metavar="OUT", type=path, help="a new folder for the model")
    parser.add_argument(
        "--format",
        choices=schemes(),
        metavar="FORMAT",
        help=f"format of the weights, of {', '.join(schemes())}; none for plain ones (default: that of the rollouts)",
    )


def run(args: argparse.Namespace) -> int:
    from launch.tools.export import export

    print(export(args.run_dir, args.out, None if args.format is None else schemes()[args.format]))
    return 0

"""Inject faults into real runs of a config, at random points, and count what they come to.

Workers, ranks, the driver, verifiers and Ray are killed, interrupted, stopped or slowed down, the disk is full, the
newest checkpoint is damaged. The run is started again until it has ended. Then no step, response or draw is lost or
doubled, no process is left, and a synchronous run has the bits of one that nobody has disturbed.

Only processes that this command has started are disturbed. Where it may mount, each run gets a small disk in memory."""

import argparse
from functools import partial
from pathlib import Path

from launch.arguments import add_config, number_in, path, positive_int, read_config
from launch.tools.chaos.faults import FAULTS

EXAMPLES = """\
  qarl chaos chaos --faults 20
  qarl chaos chaos --folder campaign --minutes 3       # again: goes on from there
  qarl chaos my_config.yaml --kinds 'worker killed' SIGTERM"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    parser.add_argument("--faults", type=positive_int, default=20, help="faults to inject (default: 20)")
    limit = "after so many no further fault is injected; the last run goes to its end"
    parser.add_argument("--minutes", type=number_in(0, 1e6), default=1e6, help=limit)
    parser.add_argument("--seed", type=int, default=0, help="of kinds and points of the faults (default: 0)")
    parser.add_argument(
        "--kinds", nargs="+", choices=FAULTS, default=list(FAULTS), metavar="KIND", help=", ".join(FAULTS)
    )
    folder = "where runs and results lie; a further call of the same settings goes on (default: runs/chaos-campaign)"
    parser.add_argument("--folder", type=path, default=Path("runs/chaos-campaign"), help=folder)


def run(args: argparse.Namespace) -> int:
    """Prints each fault, a table, and the counts as one line of JSON; 1 where one was not survived."""
    import json

    from launch.early import check_input
    from launch.run.resume import flatten
    from launch.tools.chaos.campaign import Campaign, table

    config = read_config(args)
    check_input(config)
    seconds, in_turn = 60 * args.minutes, config.train.max_staleness == 0
    command, settings = partial(_command, args), flatten(config.model_dump(mode="json"))
    campaign = Campaign(args.folder, command, settings, args.faults, seconds, args.seed, in_turn, args.kinds)
    import torch  # late: the checks above do not need it

    campaign.is_exact &= not torch.cuda.is_available()  # on a GPU a resumed run may round otherwise
    for line in campaign.run():
        print(line, flush=True)
    summary = campaign.summary()
    print(f"\n{table(summary)}\n{json.dumps(summary)}")
    return int(any(not outcome.is_right for outcome in campaign.outcomes))


def _command(args: argparse.Namespace, run: Path) -> list[str]:
    """What starts or continues the run in the folder `run`."""
    import sys

    own = [f"run.dir={run.parent.resolve()}", f"run.name={run.name}", "tracking.trackers=[jsonl]"]
    return [sys.executable, "-m", "launch.cli", "train", args.config, *args.overrides, *own]

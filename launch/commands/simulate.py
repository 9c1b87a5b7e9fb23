"""Simulate the training loop of a config: throughput, who waits, how old samples are, and the best split of devices.

The loop, the prompt pool and the dispatcher are the real ones; engines, learner and network are models, with the speeds
of `qarl plan`, corrected by a run where one is given (docs/plan.md)."""

import argparse
from math import inf

from launch.arguments import NETWORK, add_config, number_in, path, positive_int, read_config
from launch.tools.plan.devices import DEVICES
from qarl.errors import ConfigError

EXAMPLES = """\
  qarl simulate quickstart --from runs/quickstart --staleness 0 1 4
  qarl simulate recipes/qwen2.5_math_7b --device h100 --devices 64 --staleness 1"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    add = parser.add_argument
    add(
        "--from",
        dest="run_dir",
        type=path,
        metavar="RUN",
        help="folder of a run in turn, whose speed and lengths are taken",
    )
    add("--device", type=str.lower, choices=DEVICES, help="as for `qarl plan`")
    add("--staleness", type=int, nargs="+", metavar="N", help="values of train.max_staleness (default: the config's)")
    add("--devices", type=positive_int, metavar="N", help="find the best split of N devices into workers and ranks")
    add("--steps", type=positive_int, default=20, help="simulated steps (default: 20)")
    add("--prompt-tokens", type=positive_int, metavar="N", help="mean length of a prompt (default: as for `qarl plan`)")
    mean = "mean length of a response (default: half of max_new_tokens)"
    add("--response-tokens", type=positive_int, metavar="N", help=mean)
    spread = "standard deviation of the logarithm of the lengths (default: 0.7)"
    add("--spread", type=number_in(0, 5), default=0.7, metavar="S", help=spread)
    network = f"GB/s between machines (default: {NETWORK})"
    add("--network", type=number_in(1e-3, inf), default=NETWORK, metavar="GB/S", help=network)
    add("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    from launch.early import check_lengths, check_model_path
    from launch.run.resume import config_of_run

    modes = [f"train.max_staleness={n}" for n in args.staleness or ()]
    configs = [read_config(args, mode) for mode in modes] or [read_config(args)]
    check_lengths(configs[0], args.prompt_tokens, args.response_tokens)
    if args.devices == 1:
        raise ConfigError("a worker and a rank need a device each", "--devices", "give at least 2")
    for config in [*configs, *([config_of_run(args.run_dir)] if args.run_dir else ())]:
        check_model_path(config, plans=True)
    from launch.run.terminal import console
    from launch.tools.simulate.command import Simulator, render, to_json

    lengths = (args.prompt_tokens, args.response_tokens, args.spread)
    simulator = Simulator(args.device, *lengths, args.steps, args.network * 1e9, args.run_dir)
    splits = [simulator.splits(one, args.devices) for one in configs] if args.devices else []
    outcomes = [found[0] for found in splits] or [simulator.simulate(one) for one in configs]
    if args.json:
        print(to_json(outcomes, splits))
    else:
        console().print(render(outcomes, splits))
    return 0

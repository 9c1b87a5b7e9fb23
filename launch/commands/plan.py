"""Estimate, from the config alone, whether a run fits its machines and whether quantized rollouts pay.

For a run that samples ahead it simulates the step, as `qarl simulate` does at these speeds."""

import argparse
import json
import os
import sys

from launch.arguments import add_config, positive_int, read_config
from launch.tools.plan.devices import DEVICES
from qarl.errors import ConfigError, UsageError

EXAMPLES = """\
  qarl plan quickstart
  qarl plan gsm8k_qwen2.5_0.5b --device h100
  qarl plan my_config.yaml --measure --json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    add = parser.add_argument
    add("--device", type=str.lower, choices=DEVICES, help="what the run computes on (default: that of cluster.device)")
    add("--measure", action="store_true", help="measure this machine's speed for some seconds instead of assuming it")
    add("--prompt-tokens", type=positive_int, metavar="N", help="mean length of a prompt (default: 256, or what fits)")
    add("--response-tokens", type=positive_int, metavar="N", help="mean length of a response (default: max_new_tokens)")
    add("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Print the plan; 2 when the run cannot work, and stderr says why."""
    from launch.early import check_lengths, check_model_path

    config = read_config(args)
    check_lengths(config, args.prompt_tokens, args.response_tokens)
    check_model_path(config, plans=True)
    import torch
    from rich.console import Group

    from launch.preflight import model_config
    from launch.run.terminal import console
    from launch.tools.plan.command import choose_device, render, to_tree
    from launch.tools.plan.measure import measure
    from launch.tools.plan.planner import Planner
    from launch.tools.simulate.ahead import simulate_ahead
    from qarl.numerics.vllm_patch import PROCESS_ENV

    model, device = model_config(config), choose_device(config, args.device)
    if args.measure:
        if device.kind == "cuda" and not torch.cuda.is_available():
            raise ConfigError(f"this machine has no {device.name} to measure", "--measure", "leave it out")
        os.environ.update(PROCESS_ENV)  # what engines and learners run under; oneDNN reads it at its first GEMM
        device = measure(device)
    plan = Planner(config, model, device, args.prompt_tokens, args.response_tokens, args.measure).plan()
    ahead = None
    if config.train.max_staleness and not plan.faults:
        ahead = simulate_ahead(config, plan, device, args.response_tokens is not None)
    if args.json:
        print(json.dumps(to_tree(plan) | {"simulated": ahead and ahead.to_tree()}, indent=2))
    else:
        console().print(Group(render(plan), *([ahead.render()] if ahead else [])))
    for fault in plan.faults:
        print(f"qarl: {fault}", file=sys.stderr)
    return UsageError.exit_code if plan.faults else 0

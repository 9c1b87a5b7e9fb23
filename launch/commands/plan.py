"""Estimate, from the config alone, whether a run fits its machines and whether quantized rollouts pay."""

import argparse

from launch.arguments import add_config, positive_int, read_config

EXAMPLES = """\
  qarl plan quickstart
  qarl plan gsm8k_qwen2.5_0.5b --device h100
  qarl plan my_config.yaml --measure --json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    add = parser.add_argument
    add("--device", help="cpu, a100, h100, h200, l40s or b200 (default: that of cluster.device)")
    add("--measure", action="store_true", help="measure this machine's speed for some seconds instead of assuming it")
    add("--prompt-tokens", type=positive_int, metavar="N", help="mean length of a prompt (default: 256, or what fits)")
    add("--response-tokens", type=positive_int, metavar="N", help="mean length of a response (default: max_new_tokens)")
    add("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    config = read_config(args)
    from launch.tools.plan.command import plan

    return plan(config, args.device, args.measure, args.json, args.prompt_tokens, args.response_tokens)

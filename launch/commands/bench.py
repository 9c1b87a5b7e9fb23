"""Measure whole steps, modes of the loop, or one part: prompt pool, losses, layers, publication, or GPU kernels."""

import argparse
from importlib import import_module
from inspect import signature

from launch.arguments import multiple_of_128, path, path_text, positive_int

EXAMPLES = """\
  qarl bench pool --sizes 10000 100000
  qarl bench learner --hidden 1024 --tokens 256
  qarl bench kernels
  qarl bench loop long_sorter --steps 8
  qarl bench steps smollm2_chain_sum --settings '' learner.prox=recompute
  qarl bench e2e --configs quickstart --steps 5"""
DTYPES = ("float32", "bfloat16 learner.zero_stage=1")  # DeepSpeed refuses stage 0 in bfloat16
ROWS = [f"model.dtype={dtype}{rest}" for dtype in DTYPES for rest in (" rollout.scheme=none", "")]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parts = parser.add_subparsers(required=True, metavar="WHAT", dest="part")

    def part(name: str, text: str, rounds: int = 0) -> argparse.ArgumentParser:
        added: argparse.ArgumentParser = parts.add_parser(name, help=text, description=text)
        if rounds:
            added.add_argument("--rounds", type=positive_int, default=rounds, help=f"timed rounds (default: {rounds})")
        return added

    pool = part("pool", "time and memory of the prompt pool, by size and strategy")
    sizes = "numbers of prompts in the pool (default: 10000 100000 1000000)"
    million = [10_000, 100_000, 1_000_000]
    pool.add_argument("--sizes", type=positive_int, nargs="+", default=million, metavar="PROMPTS", help=sizes)
    pool.add_argument("--batch", type=positive_int, default=512, help="prompts of one draw (default: 512)")
    pool.add_argument("--steps", type=positive_int, default=1000, help="timed steps (default: 1000)")
    part("objectives", "every loss beside a plain masked mean", rounds=50)
    learner = part("learner", "aligned linears beside bfloat16, exact numerics beside stock, on CPU", rounds=5)
    widths, lengths = "widths of the layers (default: 1024 2048)", "lengths, in tokens (default: 256 1500)"
    learner.add_argument("--hidden", type=multiple_of_128, nargs="*", default=[1024, 2048], help=widths)
    learner.add_argument("--tokens", type=positive_int, nargs="*", default=[256, 1500], help=lengths)
    publish = part("publish", "a publication beside a bfloat16 checkpoint quantized again, on CPU", rounds=5)
    publish.add_argument("--hidden", type=multiple_of_128, default=1024, help="width of the model (default: 1024)")
    publish.add_argument("--layers", type=positive_int, default=4, help="number of layers (default: 4)")
    publish.add_argument("--model", type=path, help="a Hugging Face model folder, in place of a random model")
    kernels = part("kernels", "every low-bit linear on CUDA beside bfloat16", rounds=20)
    widths, lengths = "widths of the layers (default: 2048 4096)", "numbers of tokens (default: 1 64 1024 8192)"
    kernels.add_argument("--hidden", type=multiple_of_128, nargs="+", default=[2048, 4096], help=widths)
    kernels.add_argument("--tokens", type=positive_int, nargs="+", default=[1, 64, 1024, 8192], help=lengths)
    stepping = part(
        "steps", "whole steps under several settings, beside what `qarl plan --measure` estimates", rounds=1
    )
    stepping.add_argument("config", type=path_text, help="a config file, or the name of a shipped one")
    each = "settings of one row, as 'a.b=c d.e=f' ('' for the config as it is)"
    stepping.add_argument("--settings", nargs="+", default=ROWS, metavar="SETTINGS", help=f"{each}; default: {ROWS}")
    stepping.add_argument("--steps", type=positive_int, default=3, help="measured steps of a run (default: 3)")
    common = "settings of all rows"
    stepping.add_argument("--overrides", nargs="*", default=[], metavar="key=value", help=common)
    loop = part("loop", "sampling in turn with learning, one step off, and up to four versions ahead", rounds=1)
    loop.add_argument(
        "config", type=path_text, help="a config file, or the name of a shipped one; best one of long-tailed lengths"
    )
    loop.add_argument("--steps", type=positive_int, default=8, help="measured steps of a run (default: 8)")
    loop.add_argument("--overrides", nargs="*", default=[], metavar="key=value", help="settings of all runs")
    e2e = part(
        "e2e", "whole steps beside TRL's GRPOTrainer, which it installs into an environment of its own", rounds=2
    )
    both, settings = ["quickstart", "smollm2_chain_sum"], "settings in place of each config's own"
    e2e.add_argument("--configs", nargs="+", default=both, help=f"configs (default: {' '.join(both)})")
    e2e.add_argument("--steps", type=positive_int, default=4, help="measured steps of a run (default: 4)")
    e2e.add_argument("--overrides", nargs="*", default=[], metavar="key=value", help=settings)


def run(args: argparse.Namespace) -> int:
    """Print what the `bench` of the part's module yields; its parameters are options of the same names."""
    _check_inputs(args)
    bench = import_module(f"launch.tools.bench.{args.part}").bench
    options = {name: value for name, value in vars(args).items() if name in signature(bench).parameters}
    for line in bench(**options):
        print(line, flush=True)
    return 0


def _check_inputs(args: argparse.Namespace) -> None:
    """A wrong config or model stops the bench before its first run, and before torch is imported."""
    from itertools import product

    from launch.early import check_input
    from qarl.config.io import load_config
    from qarl.config.shipped import config_path
    from qarl.model_folder import config_json

    options = vars(args)
    if options.get("model"):
        config_json(args.model)
    configs = options.get("configs") or [options["config"]] if "overrides" in options else []
    for name, settings in product(configs, options.get("settings", [""])):
        check_input(load_config(config_path(name), [*args.overrides, *settings.split()]))

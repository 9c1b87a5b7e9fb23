"""Measure where the gap between a learner and the engine comes from, switching one thing at a time."""

import argparse
from pathlib import Path

from launch.arguments import add_formats, number_in, path, path_text, positive_int, schemes
from qarl.config.shipped import config_path

EXAMPLES = """\
  qarl mismatch models/qwen --scheme w8a8_int8 fp8_channel
  qarl mismatch mismatch_model --lengths 256 --num-sequences 16"""
PROFILES = ("unaligned", "stock", "portable", "engine")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "model",
        type=path_text,
        metavar="MODEL",
        help="a Hugging Face folder, or a config: its model, built when it does not exist",
    )
    add_formats(add, "--scheme", "formats to test (default: w8a8_int8)", nargs="+", default=["w8a8_int8"])
    add("--ignore", nargs="*", default=["lm_head"], metavar="LAYER", help="layers to keep in full precision")
    dtypes = ["bfloat16", "float32"]
    add("--dtype", nargs="+", default=dtypes[:1], choices=dtypes, help="model dtypes to test (default: bfloat16)")
    lengths = "lengths of the responses, in tokens (default: those of 256 and 1500 that fit, or what fits)"
    add("--lengths", nargs="+", type=positive_int, default=[], metavar="TOKENS", help=lengths)
    add("--numerics", nargs="+", default=["all"], choices=["all", *PROFILES], help="learners to compare (default: all)")
    add("--num-sequences", type=positive_int, default=64, help="responses, sampled in one batch (default: 64)")
    add("--prompt-tokens", type=positive_int, default=16, help="length of the random prompts (default: 16)")
    add("--prompts", type=path, metavar="FILE", help="text file of prompts, one a line, instead of random ones")
    lr = "learning rate of the step that measures staleness (default: 1e-6)"
    add("--lr", type=number_in(0, 1), default=1e-6, help=lr)
    stale = "model that takes the place of that step, such as a later checkpoint"
    add("--stale-model", type=path_text, metavar="FOLDER", help=stale)
    add("--kv-cache-gib", type=positive_int, default=2, help="size of the engine's KV cache, in GiB (default: 2)")
    add("--seed", type=int, default=0, help="seed of prompts and responses (default: 0)")
    out = "folder for mismatch.json and mismatch.png (default: runs/mismatch)"
    add("--out", type=path, default=Path("runs/mismatch"), help=out)


def run(args: argparse.Namespace) -> int:
    from launch.early import check_model_path
    from qarl.config.io import load_config
    from qarl.errors import DataError
    from qarl.model_folder import config_json

    model, is_config = args.model, not Path(args.model).is_dir()
    if is_config:
        check_model_path(config := load_config(config_path(model)))
    for folder in filter(None, [None if is_config else model, args.stale_model]):
        config_json(Path(folder))
    if args.prompts and not args.prompts.is_file():
        raise DataError("no such file", str(args.prompts))
    from rich.console import Console

    from launch.demo.pretrained import fetch_missing
    from launch.demo.tiny_model import ensure_model
    from launch.tools.mismatch.measure import Comparison, run
    from launch.tools.mismatch.report import WIDTH, render
    from qarl.quant.scheme import QuantScheme

    if is_config:
        fetch_missing(config, print)
        ensure_model(config.model, config.task, config.seed, print)
        model = config.model.path
    options = {name: value for name, value in vars(args).items() if name in Comparison.__dataclass_fields__}
    known = schemes()
    options |= {
        "model": model,
        "schemes": [QuantScheme.of(known[s].name, args.ignore, known[s].group_size) for s in args.scheme],
        "dtypes": args.dtype,
        "profiles": PROFILES if "all" in args.numerics else args.numerics,
    }
    Console(width=WIDTH).print(render(run(Comparison(**options), args.out)))
    print(f"\n{args.out}/mismatch.json, {args.out}/mismatch.png")
    return 0

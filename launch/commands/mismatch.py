"""Measure where the gap between a learner and the engine comes from, switching one thing at a time."""

import argparse
from pathlib import Path
from typing import Any

from launch.arguments import add_formats, number_in, path, path_text, positive_int, schemes
from qarl.config.shipped import config_path

EXAMPLES = """\
  qarl mismatch runs/quickstart
  qarl mismatch models/qwen --scheme w8a8_int8 fp8_channel
  qarl mismatch mismatch_model --lengths 256 --num-sequences 16"""
PROFILES = ("unaligned", "stock", "portable", "engine")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "model",
        type=path_text,
        metavar="MODEL",
        help="a Hugging Face folder; or a config: its model, built when it does not exist; or a run: its final model, "
        "in the scheme, dtype and length of its rollouts after its own held-out prompts, for its report",
    )
    add_formats(add, "--scheme", "formats to test (default: w8a8_int8)", nargs="+")
    add("--ignore", nargs="*", metavar="LAYER", help="layers to keep in full precision (default: lm_head)")
    dtypes = ["bfloat16", "float32"]
    add("--dtype", dest="dtypes", nargs="+", choices=dtypes, help="model dtypes to test (default: bfloat16)")
    lengths = "lengths of the responses, in tokens (default: those of 256 and 1500 that fit, or what fits)"
    add("--lengths", nargs="+", type=positive_int, default=[], metavar="TOKENS", help=lengths)
    add("--numerics", nargs="+", default=["all"], choices=["all", *PROFILES], help="learners to compare (default: all)")
    add("--num-sequences", type=positive_int, default=64, help="responses, sampled in one batch (default: 64)")
    add("--prompt-tokens", type=positive_int, default=16, help="length of the random prompts (default: 16)")
    add("--prompts", type=path, metavar="FILE", help="text file of prompts, one a line, instead of random ones")
    lr = "learning rate of the step that measures staleness (default: 1e-6)"
    add("--lr", type=number_in(0, 1), help=lr)
    stale = "model that takes the place of that step, such as a later checkpoint"
    add("--stale-model", type=path_text, metavar="FOLDER", help=stale)
    add("--kv-cache-gib", type=positive_int, default=2, help="size of the engine's KV cache, in GiB (default: 2)")
    add("--seed", type=int, default=0, help="seed of prompts and responses (default: 0)")
    out = "folder for mismatch.json and mismatch.png (default: that of the run, or runs/mismatch)"
    add("--out", type=path, help=out)


def run(args: argparse.Namespace) -> int:
    from launch.early import check_model_path
    from launch.run.resume import CONFIG_FILE
    from launch.tools.evaluation.settings import config_of
    from qarl.config.io import load_config
    from qarl.errors import DataError
    from qarl.model_folder import config_json

    model, is_run, is_config = args.model, (Path(args.model) / CONFIG_FILE).is_file(), not Path(args.model).is_dir()
    if is_run:
        config = config_of(model, [])
    elif is_config:
        check_model_path(config := load_config(config_path(model)))
    else:
        config_json(Path(model))
    if args.stale_model:
        config_json(Path(args.stale_model))
    if args.prompts and not args.prompts.is_file():
        raise DataError("no such file", str(args.prompts))
    from rich.console import Console

    from launch.demo.pretrained import fetch_missing
    from launch.demo.tiny_model import ensure_model
    from launch.run.prompts import load_prompts
    from launch.run.report import read_summary
    from launch.tools.mismatch.measure import Comparison, run
    from launch.tools.mismatch.report import WIDTH, render
    from qarl.config.schedule import scheme_at
    from qarl.quant.scheme import QuantScheme

    if is_config:
        fetch_missing(config, print)
        ensure_model(config.model, config.task, config.seed, print)
    options: dict[str, Any] = {"dtypes": ["bfloat16"], "lr": 1e-6}
    known = schemes()
    measured, ignore = [known["w8a8_int8"]], ["lm_head"]
    if is_run:
        rollout = config.rollout
        options = {"dtypes": [config.model.dtype], "lr": config.learner.optimizer.lr}
        options |= {
            "steps": read_summary(Path(model)).steps,
            "lengths": [rollout.sampling.max_new_tokens],
            "heldout": load_prompts(config, print)[2],
        }
        measured, ignore = [scheme_at(rollout, config.train.steps)], rollout.ignore
    if args.scheme:
        measured = [known[name] for name in args.scheme]
    if args.ignore is not None:
        ignore = args.ignore
    given = {name: value for name, value in vars(args).items() if name in Comparison.__dataclass_fields__}
    options |= {name: value for name, value in given.items() if value not in (None, [])}
    options["profiles"] = PROFILES if "all" in args.numerics else args.numerics
    options["schemes"] = [QuantScheme.of(scheme.name, ignore, scheme.group_size) for scheme in measured]
    options["model"] = config.model.path if is_run or is_config else model
    out = args.out or Path(model if is_run else "runs/mismatch")
    Console(width=WIDTH).print(render(run(Comparison(**options), out)))
    print(f"\n{out}/mismatch.json, {out}/mismatch.png")
    if is_run and not args.out:
        print(f"`qarl report {model}` draws them, too")
    return 0

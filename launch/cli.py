"""The command line: `qarl train`, `submit`, `plan`, `report`, `export`, `study`, `mismatch`, `config`, `bench`."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from types import FrameType
from typing import Any, get_args

from launch.arguments import positive_int
from launch.tools.bench.commands import add_bench_commands
from qarl.config.io import documentation, load_config, to_yaml
from qarl.config.run import Config
from qarl.errors import QarlError
from qarl.quant.scheme import QuantScheme, SchemeName


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 0 done, 1 a run failed, 2 wrong input, 3 it diverged, 130 interrupted."""
    args = _parser().parse_args(argv)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        return int(args.run(args) or 0)
    except QarlError as error:
        if os.environ.get("QARL_TRACEBACK"):
            raise
        print(f"qarl: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("qarl: interrupted; the same command continues from the last checkpoint", file=sys.stderr)
        return 130


def config_path(name: str, folder: str = "") -> Path:
    """The config called `name`: a file, or by its stem a config shipped in `folder` of `configs/`."""
    path = Path(name)
    if path.suffix in {".yaml", ".yml"} or path.exists():
        return path
    return Path(str(resources.files("configs"))) / folder / f"{name}.yaml"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="qarl",
        description="Quantized-rollout RL for LLMs.",
        epilog="QARL_TRACEBACK=1 shows the traceback behind an error.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="run, or continue, a training run")
    _config_arguments(train)
    train.set_defaults(run=_train)

    submit = commands.add_parser("submit", help="run on a Ray cluster, as a job")
    _config_arguments(submit)
    submit.add_argument("--address", required=True, help="dashboard of the cluster's head: http://host:8265")
    submit.add_argument("--no-wait", action="store_true", help="return once the job is accepted")
    submit.set_defaults(run=_submit)

    plan = commands.add_parser("plan", help="whether a run fits, and whether quantized rollouts pay; loads no weights")
    _config_arguments(plan)
    plan.add_argument("--device", help="cpu, a100, h100, h200, l40s or b200; that of cluster.device by default")
    plan.add_argument("--measure", action="store_true", help="take this machine's rates, measured for some seconds")
    plan.add_argument("--prompt-tokens", type=positive_int, metavar="N", help="mean prompt (256, or what fits)")
    plan.add_argument("--response-tokens", type=positive_int, metavar="N", help="mean response (max_new_tokens)")
    plan.add_argument("--json", action="store_true", help="print JSON")
    plan.set_defaults(run=_plan)

    report = commands.add_parser("report", help="print the summary of a finished run and remake its report")
    report.add_argument("run_dir", help="for example runs/quickstart")
    report.set_defaults(run=_report)

    _folder_commands(commands)

    study = commands.add_parser("study", help="run the arms of an experiment over several seeds, and compare them")
    study.add_argument("name", help="a YAML file, or the name of a file in configs/study")
    study.add_argument("--seeds", type=int, nargs="+", default=[], help="instead of the file's own")
    study.add_argument("--arms", nargs="+", default=[], metavar="ARM", help="only these")
    study.add_argument("--out", metavar="FOLDER", help="where the report goes (runs/studies/NAME)")
    study.add_argument("--report-only", action="store_true", help="run nothing, report what is there")
    study.set_defaults(run=_study)

    mismatch = commands.add_parser("mismatch", help="where the gap between learner and engine comes from")
    _mismatch_arguments(mismatch)
    mismatch.set_defaults(run=_mismatch)

    config = commands.add_parser("config", help="show, list or explain configs").add_subparsers(
        required=True, metavar="WHAT"
    )
    show = config.add_parser("show", help="the resolved config")
    _config_arguments(show)
    show.set_defaults(run=_config_show)
    config.add_parser("list", help="the shipped configs").set_defaults(run=_config_list)
    config.add_parser("keys", help="every key with its default and meaning").set_defaults(run=_config_keys)

    add_bench_commands(commands)
    return parser


def _folder_commands(commands: Any) -> None:
    """Add what writes model folders to argparse's `commands`."""
    export = commands.add_parser("export", help="write a run's newest checkpoint as a model folder, checked with vLLM")
    export.add_argument("run_dir", metavar="RUN", type=Path, help="for example runs/quickstart")
    export.add_argument("out", metavar="OUT", type=Path, help="a new folder")
    export.add_argument("--format", choices=_schemes(), help="none for plain weights (that of the run's rollouts)")
    export.set_defaults(run=_export)

    split = commands.add_parser("split-outliers", help="write a model with outlier channels split: the same function")
    split.add_argument("model", type=Path, help="a Hugging Face model folder")
    split.add_argument("out", type=Path, help="a new folder")
    split.add_argument("--channels", type=positive_int, required=True, help="channels to split in every MLP")
    split.set_defaults(run=_split_outliers)


def _config_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="a YAML file, or the name of a shipped config")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example train.steps=10 seed=1")


def _mismatch_arguments(parser: argparse.ArgumentParser) -> None:
    profiles = ("unaligned", "stock", "portable", "engine")
    add = parser.add_argument
    add("model", metavar="MODEL", help="a Hugging Face folder, or a config: its model, made when it is not there")
    add("--scheme", nargs="+", default=["w8a8_int8"], choices=_schemes(), help="formats (w8a8_int8)")
    add("--ignore", nargs="*", default=["lm_head"], metavar="LAYER", help="layers that are not quantized (lm_head)")
    add("--dtype", nargs="+", default=["bfloat16"], choices=["bfloat16", "float32"], help="bfloat16")
    add(
        "--lengths", nargs="+", type=positive_int, default=[256, 1500], metavar="TOKENS", help="of responses (256 1500)"
    )
    add("--numerics", nargs="+", default=["all"], choices=["all", *profiles], help="learners to compare (all)")
    add("--num-sequences", type=positive_int, default=64, help="responses, sampled in one batch (64)")
    add("--prompt-tokens", type=positive_int, default=16, help="length of the random prompts (16)")
    add("--prompts", type=Path, metavar="FILE", help="prompts instead, one a line")
    add("--lr", type=float, default=1e-6, help="of the optimizer step that makes the learner's weights newer (1e-6)")
    add(
        "--stale-model", metavar="FOLDER", help="the learner's newer weights instead, for example of a later checkpoint"
    )
    add("--kv-cache-gib", type=positive_int, default=2, help="KV cache of the engine (2)")
    add("--seed", type=int, default=0, help="of prompts and responses (0)")
    add(
        "--out",
        type=Path,
        default=Path("runs/mismatch"),
        help="folder for mismatch.json and mismatch.png (runs/mismatch)",
    )


def _schemes() -> dict[str, QuantScheme]:
    """Every scheme by its label."""
    schemes = [QuantScheme(name, group_size=size) for name in get_args(SchemeName) for size in (32, 64, 128)]
    return {scheme.label: scheme for scheme in schemes}


def _train(args: argparse.Namespace) -> None:
    config = load_config(config_path(args.config), args.overrides)
    _ray_environment(config)
    from launch.train import train  # late: torch and ray are slow to import, and a bad config needs neither

    train(config)


def _ray_environment(config: Config) -> None:
    """Ray reads these once, when it is imported."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # keep CPU actors' view of accelerators
    has_token = "RAY_AUTH_TOKEN" in os.environ or (Path.home() / ".ray" / "auth_token").exists()
    if config.cluster.address is None:
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # our own Ray listens on this machine only
    elif has_token:
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def _submit(args: argparse.Namespace) -> int:
    from launch.cluster.jobs import submit

    return submit(str(config_path(args.config)), args.overrides, args.address, wait=not args.no_wait)


def _plan(args: argparse.Namespace) -> int:
    config = load_config(config_path(args.config), args.overrides)
    from launch.tools.plan.command import plan

    return plan(config, args.device, args.measure, args.json, args.prompt_tokens, args.response_tokens)


def _report(args: argparse.Namespace) -> None:
    from rich.console import Console

    from launch.run.report import read_summary, render_summary, write_report

    summary = read_summary(Path(args.run_dir))
    write_report(Path(args.run_dir), summary)
    Console().print(render_summary(summary))


def _export(args: argparse.Namespace) -> None:
    from launch.tools.export import export

    scheme = None if args.format is None else _schemes()[args.format]
    print(export(args.run_dir, args.out, scheme))


def _split_outliers(args: argparse.Namespace) -> None:
    from launch.tools.split import split

    print(split(args.model, args.out, args.channels))


def _study(args: argparse.Namespace) -> bool:
    from launch.tools.study.arms import RUNS, load_study, plan, results, run_study
    from launch.tools.study.report import write_study_report

    study = load_study(config_path(args.name, "study"), args.arms, args.seeds)
    runs = plan(study)
    if not args.report_only:
        run_study(runs)
    found = list(results(runs))
    print(f"report: {write_study_report(study, runs, found, Path(args.out or f'{RUNS}/{study.name}'))}")
    return any(result.status == "failed" for result in found)


def _mismatch(args: argparse.Namespace) -> None:
    from rich.console import Console

    from launch.demo.tiny_model import ensure_model
    from launch.tools.mismatch.measure import PROFILES, Comparison, run
    from launch.tools.mismatch.report import WIDTH, render

    model = args.model
    if not Path(model).is_dir():
        config = load_config(config_path(model), [])
        ensure_model(config.model, config.task, config.seed, print)
        model = config.model.path
    asked = Comparison(
        model=model,
        schemes=[QuantScheme.of(s.name, args.ignore, s.group_size) for s in map(_schemes().__getitem__, args.scheme)],
        dtypes=args.dtype,
        lengths=args.lengths,
        profiles=PROFILES if "all" in args.numerics else args.numerics,
        num_sequences=args.num_sequences,
        prompt_tokens=args.prompt_tokens,
        prompts=args.prompts,
        lr=args.lr,
        stale_model=args.stale_model,
        kv_cache_gib=args.kv_cache_gib,
        seed=args.seed,
    )
    Console(width=WIDTH).print(render(run(asked, args.out)))
    print(f"\n{args.out}/mismatch.json, {args.out}/mismatch.png")


def _config_show(args: argparse.Namespace) -> None:
    print(to_yaml(load_config(config_path(args.config), args.overrides)), end="")


def _config_list(_: argparse.Namespace) -> None:
    folder = Path(str(resources.files("configs")))
    for file in sorted(folder.glob("**/*.yaml")):
        name = file.relative_to(folder).with_suffix("").as_posix()
        print(f"{name:28s} {file.read_text().splitlines()[0].removeprefix('# ')}")


def _config_keys(_: argparse.Namespace) -> None:
    for key, default, description in documentation():
        shown = default.replace("\n", "\\n")  # one line each
        print(f"{key}{f' = {shown}' if default else ''}\n    {description}")


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())

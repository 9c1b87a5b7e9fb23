"""`qarl plan`: prints whether a run fits its machines and whether quantized rollouts pay, before any is booked."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.table import Table

from launch.preflight import model_config
from launch.tools.plan.devices import GPUS, Device, device_called
from launch.tools.plan.measure import measure
from launch.tools.plan.planner import make_plan
from launch.tools.plan.result import Plan
from qarl.config.run import Config
from qarl.errors import ConfigError
from qarl.numerics.vllm_patch import PROCESS_ENV


def plan(
    config: Config,
    device_name: str | None,
    measured: bool,
    as_json: bool,
    prompt_tokens: int | None,
    response_tokens: int | None,
) -> int:
    """Print the plan; returns 1 when the run cannot work, and says why on stderr.

    Raises:
        UsageError: no model config, an unknown device, or none to measure here.
    """
    model = model_config(config)
    device = choose_device(config, device_name)
    if measured:
        if device.kind == "cuda" and not torch.cuda.is_available():
            raise ConfigError(f"this machine has no {device.name} to measure", where="--measure")
        os.environ.update(PROCESS_ENV)  # what engines and learners run under; oneDNN reads it at its first GEMM
        device = measure(device)
    made = make_plan(config, model, device, prompt_tokens, response_tokens)
    if as_json:
        print(to_json(made))
    else:
        Console().print(render(made))
    for fault in made.faults:
        print(f"qarl: {fault}", file=sys.stderr)
    return 1 if made.faults else 0


def choose_device(config: Config, name: str | None) -> Device:
    """The device called `name`, else that of `cluster.device`: the CPU, or this machine's GPU when it is a known one.

    Raises ConfigError when that tells no device.
    """
    if name is not None:
        return device_called(name)
    gpu_here = torch.cuda.is_available()
    if config.cluster.device == "cpu" or (config.cluster.device == "auto" and not gpu_here):
        return device_called("cpu")
    here = torch.cuda.get_device_name().lower() if gpu_here else "no GPU"
    found = [gpu for gpu in GPUS if gpu.name in here]
    if not found:
        known = ", ".join(gpu.name for gpu in GPUS)
        raise ConfigError(f"which GPU? This machine has {here}", where="--device", mend=f"name one of {known}")
    return found[0]


def to_json(made: Plan) -> str:
    """The plan as JSON, with its verdict and its sums."""
    tree = asdict(made)
    for estimate, row in zip(made.estimates, tree["estimates"], strict=True):
        if estimate.times is not None:
            row["times"]["step_s"] = estimate.times.step_s
    for stage, learner in made.learner.items():
        tree["learner"][stage]["peak"] = learner.peak
    return json.dumps(tree | {"verdict": list(made.verdict())}, indent=2)


def render(made: Plan) -> RenderableType:
    """The plan as tables for the terminal."""
    active = "" if made.active_parameters == made.parameters else f" ({made.active_parameters:,} active)"
    return Group(
        f"{made.run}: {made.model}, {made.parameters:,} parameters{active}",
        f"{made.scheme} on {made.device}: {made.device_source}",
        f"{made.prompt_tokens} prompt tokens, {made.response_tokens} response tokens. Times and peaks are estimates "
        "(docs/plan.md).",
        _layers(made),
        _learner(made),
        _engine(made),
        _formats(made),
        _steps(made),
        *([_gains(made)] if made.by_batch else []),
        "\n".join(made.verdict()),
    )


def _layers(made: Plan) -> Table:
    table = _table("Layers", "", "count", "N", "K", "engine kernel")
    for row in made.layers:
        kernel = row.engine_kernel or ("none" if row.quantized else "dense")
        table.add_row(row.name.removeprefix("model."), f"{row.count:,}", f"{row.n:,}", f"{row.k:,}", kernel)
    table.caption = f"learner: numerics {made.numerics}, GEMM {made.learner_kernel}"
    return table


def _learner(made: Plan) -> Table:
    stages = [f"ZeRO-{stage}{'*' if stage == made.zero_stage else ''}" for stage in made.learner]
    table = _table("Learner rank", "", *stages)
    sizes = [{**asdict(learner), "peak": learner.peak} for learner in made.learner.values()]
    for part in sizes[0]:
        table.add_row(part, *(_size(size[part]) for size in sizes))
    table.caption = f"* configured; {made.ranks} ranks, {_size(made.learner_budget)} for each"
    return table


def _engine(made: Plan) -> Table:
    engine = made.engine
    names = ["weights", "activations", "KV cache", "bytes/token", "tokens", "sequences", "at once"]
    table = _table("Engine", *names)
    table.add_row(
        *map(_size, (engine.weights, engine.working, engine.kv_cache)),
        *(f"{count:,}" for count in (engine.kv_per_token, engine.tokens, made.own.sequences, made.own.slots)),
    )
    table.caption = f"of {_size(made.engine_budget)}; sequences of rollout.max_model_len fit the KV cache"
    return table


def _formats(made: Plan) -> Table:
    table = _table("Formats", "", "weights", "published", "KV tokens", "decode tokens/s", "")
    plain = made.plain.tokens_per_s
    for row in made.estimates:
        speed = row.tokens_per_s
        gain = f"{speed / plain:.2f}x" if speed and plain else ""
        sizes = (_size(row.weight_bytes), _size(row.published_bytes), f"{row.kv_tokens:,}")
        table.add_row(row.scheme, *sizes, f"{speed:,.0f}" if speed else "-", gain)
    table.caption = "\n".join(f"{row.scheme}: {row.fault}" for row in made.estimates if row.fault) or None
    return table


def _steps(made: Plan) -> Table:
    table = _table("Seconds of a training step", "", "rollout", "learner", "publication", "step", "")
    plain = made.plain.times
    for row in made.estimates:
        if times := row.times:
            parts = (times.rollout_s, times.learner_s, times.publication_s, times.step_s)
            gain = f"{plain.step_s / times.step_s:.2f}x" if plain else ""
            table.add_row(row.scheme, *(f"{seconds:.3g}" for seconds in parts), gain)
    return table


def _gains(made: Plan) -> Table:
    table = _table(
        f"{made.own.scheme} against full precision", "", *("",) * max(len(made.by_batch), len(made.by_response))
    )
    for title, gains in (("sequences per engine", made.by_batch), ("response tokens", made.by_response)):
        table.add_row(title, *(f"{size:,}" for size in gains))
        table.add_row("  speed-up", *(f"{gain:.2f}x" for gain in gains.values()))
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(
        title=title,
        box=SIMPLE_HEAD,
        title_justify="left",
        caption_justify="left",
        header_style="dim",
        padding=(0, 1, 0, 0),
    )
    table.show_header = any(columns)
    table.show_edge = False
    for index, name in enumerate(columns):
        table.add_column(name, justify="left" if index == 0 and not name else "right", no_wrap=True)
    return table


def _size(count: float) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"

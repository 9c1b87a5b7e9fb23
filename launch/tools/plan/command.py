"""The device of a plan, and the plan as JSON and as tables."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table

from launch.tools.plan.devices import GPUS, Device, device_called
from launch.tools.plan.result import Plan
from qarl.config.run import Config
from qarl.errors import ConfigError


def choose_device(config: Config, name: str | None) -> Device:
    """The device called `name`, else that of `cluster.device`: the CPU, or this machine's GPU when it is a known one.

    Raises ConfigError for an unknown name, or a GPU that the table lacks.
    """
    if name is not None:
        return device_called(name)
    has_gpu = torch.cuda.is_available()
    if config.cluster.device == "cpu" or (config.cluster.device == "auto" and not has_gpu):
        return device_called("cpu")
    own = torch.cuda.get_device_name().lower() if has_gpu else "no GPU"
    found = [gpu for gpu in GPUS if gpu.name in own]
    if not found:
        known = ", ".join(gpu.name for gpu in GPUS)
        raise ConfigError(f"which GPU? This machine has {own}", where="--device", hint=f"name one of {known}")
    return found[0]


def to_tree(result: Plan) -> dict[str, Any]:
    """The plan for JSON, with its verdict and its sums."""
    tree = asdict(result)
    for estimate, row in zip(result.estimates, tree["estimates"], strict=True):
        if estimate.times is not None:
            row["times"]["step_s"] = estimate.times.step_s
    for stage, learner in result.learner.items():
        tree["learner"][stage]["peak"] = learner.peak
    return tree | {"verdict": list(result.verdict())}


def render(result: Plan) -> RenderableType:
    """The plan as tables for the terminal."""
    here = "" if Path(result.model).exists() else " (not here yet)"
    active = "" if result.active_parameters == result.parameters else f" ({result.active_parameters:,} active)"
    return Group(
        f"{result.run}: {result.model}{here}, {result.parameters:,} parameters{active}",
        f"{result.scheme} on {result.device}: {result.device_source}",
        f"{result.prompt_tokens} prompt tokens, {result.response_tokens} response tokens. "
        "Times and peaks are estimates (docs/plan.md).",
        _layers(result),
        _learner(result),
        _engine(result),
        _formats(result),
        _steps(result),
        *([_gains(result)] if result.by_batch else []),
        "\n".join(result.verdict()),
    )


def _layers(result: Plan) -> Table:
    table = table_of("Layers", "", "count", "N", "K", "engine kernel")
    for row in result.layers:
        kernel = row.engine_kernel or ("none" if row.quantized else "dense")
        table.add_row(row.name.removeprefix("model."), f"{row.count:,}", f"{row.n:,}", f"{row.k:,}", kernel)
    table.caption = f"learner: numerics {result.numerics}, GEMM {result.learner_kernel}"
    return table


def _learner(result: Plan) -> Table:
    stages = [f"ZeRO-{stage}{'*' if stage == result.zero_stage else ''}" for stage in result.learner]
    table = table_of("Learner rank", "", *stages)
    sizes = [{**asdict(learner), "peak": learner.peak} for learner in result.learner.values()]
    for part in sizes[0]:
        table.add_row(part, *(_size(size[part]) for size in sizes))
    table.caption = f"* configured; {result.ranks} ranks, {_size(result.learner_budget)} for each"
    return table


def _engine(result: Plan) -> Table:
    engine = result.engine
    names = ["weights", "activations", "KV cache", "bytes/token", "tokens", "sequences", "at once"]
    table = table_of("Engine", *names)
    table.add_row(
        *map(_size, (engine.weights, engine.working, engine.kv_cache)),
        *(f"{count:,}" for count in (engine.kv_per_token, engine.tokens, result.own.sequences, result.own.slots)),
    )
    table.caption = f"of {_size(result.engine_budget)}; sequences of rollout.max_model_len fit the KV cache"
    return table


def _formats(result: Plan) -> Table:
    table = table_of("Formats", "", "weights", "published", "KV tokens", "decode tokens/s", "")
    plain = result.plain.tokens_per_s
    for row in result.estimates:
        speed = row.tokens_per_s
        gain = f"{speed / plain:.2f}x" if speed and plain else ""
        sizes = (_size(row.weight_bytes), _size(row.published_bytes), f"{row.kv_tokens:,}")
        table.add_row(row.scheme, *sizes, f"{speed:,.0f}" if speed else "-", gain)
    table.caption = "\n".join(f"{row.scheme}: {row.fault}" for row in result.estimates if row.fault) or None
    return table


def _steps(result: Plan) -> Table:
    table = table_of("Seconds of a training step", "", "rollout", "learner", "publication", "step", "")
    plain = result.plain.times
    for row in result.estimates:
        if times := row.times:
            parts = (times.rollout_s, times.learner_s, times.publication_s, times.step_s)
            gain = f"{plain.step_s / times.step_s:.2f}x" if plain else ""
            table.add_row(row.scheme, *(f"{seconds:.3g}" for seconds in parts), gain)
    table.caption = "a step is the sum of its parts, as without sampling ahead"
    return table


def _gains(result: Plan) -> Table:
    width = max(len(result.by_batch), len(result.by_response))
    table = table_of(f"{result.own.scheme} against full precision", "", *[""] * width)
    for title, gains in (("sequences per engine", result.by_batch), ("response tokens", result.by_response)):
        table.add_row(title, *(f"{size:,}" for size in gains))
        table.add_row("  speed-up", *(f"{gain:.2f}x" for gain in gains.values()))
    return table


def table_of(title: str, *columns: str) -> Table:
    looks: dict[str, Any] = {"title_justify": "left", "caption_justify": "left", "header_style": "dim"}
    shown = any(columns)
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_header=shown, show_edge=False, **looks)
    for index, name in enumerate(columns):
        table.add_column(name, justify="left" if index == 0 and not name else "right", no_wrap=True)
    return table


def _size(count: float) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"

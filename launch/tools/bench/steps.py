"""`qarl bench steps`: whole training steps of a config under several settings, in turn, beside the plan's estimates.

The first step of a run warms it up and does not count; it also proves that learner and sampler agree, so that the
others score nothing before the update (`learner.prox=auto`). The estimates are those of `qarl plan --measure` for the
lengths that the run had.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean, median

from transformers import AutoConfig

from launch.run.prompts import load_prompts
from launch.tools.bench.e2e import FOLDER, qarl_run
from launch.tools.plan.devices import Device, device_called
from launch.tools.plan.measure import measure
from launch.tools.plan.planner import Planner
from launch.tools.plan.result import Times
from qarl.config.io import load_config
from qarl.config.shipped import config_path

HEADER = (
    "| settings | step, s | sampling, s | learning, s | publication, s | memory, GiB | speed |\n"
    "|---|---:|---:|---:|---:|---:|---:|"
)


def bench(config: str, settings: Sequence[str], overrides: Sequence[str], steps: int, rounds: int) -> Iterator[str]:
    """Table rows: measured and, in brackets, estimated. `speed` is the first settings' seconds a step by these.

    Args:
        settings: one string of `a.b=c` items for each row, which come after `overrides`.

    Raises:
        ConfigError, ModelError, DataError: as `qarl train`.
        QarlError: a run failed; its log is named.
    """
    device = measure(device_called("cpu"))
    yield f"{config}: {rounds} rounds of {steps} steps, one warm-up step more\n\n{HEADER}"
    FOLDER.mkdir(parents=True, exist_ok=True)
    for number in range(1, rounds + 1):
        first = 0.0
        for index, text in enumerate(settings):
            items = ["mismatch.proof_steps=1", *overrides, *text.split()]
            rows, memory = qarl_run(config, items, steps, FOLDER / f"{Path(config).stem}-{index}-{number}.log")
            step = _median(rows, "timing_s/step")
            first = first or step
            yield _row(text or "as configured", rows, memory, _estimate(config, items, rows, device), first / step)


def _row(what: str, rows: Sequence[Mapping[str, float]], memory: int, plan: Times, speed: float) -> str:
    learning = [row.get("timing_s/prox", 0.0) + row["timing_s/update"] for row in rows]
    parts = (
        (_median(rows, "timing_s/step"), plan.step_s),
        (_median(rows, "timing_s/sample"), plan.rollout_s),
        (median(learning), plan.learner_s),
        (_median(rows, "timing_s/publish"), plan.publication_s),
    )
    cells = " | ".join(f"{measured:.2f} ({estimated:.2f})" for measured, estimated in parts)
    return f"| {what} | {cells} | {memory / 2**30:.1f} | {speed:.2f} |"


def _estimate(name: str, items: Sequence[str], rows: Sequence[Mapping[str, float]], device: Device) -> Times:
    config = load_config(config_path(name), items)
    _, prompts, _ = load_prompts(config, lambda line: None)
    prompt = round(fmean(len(one.token_ids) for one in prompts))
    response = round(_median(rows, "response_length/mean"))
    model = AutoConfig.from_pretrained(config.model.path, local_files_only=True)
    times = Planner(config, model, device, prompt, response, measure=True).plan().own.times
    assert times is not None  # the run has worked
    return times


def _median(rows: Sequence[Mapping[str, float]], name: str) -> float:
    return median(row[name] for row in rows)

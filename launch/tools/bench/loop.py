"""`qarl bench loop`: a run in turn, one step off, and with samples up to four versions old, on the same work.

Each run has the same number of steps, and so of rollouts. The first step of each warms it up and does not count.
Continued: how many responses of a step new weights had interrupted.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from statistics import fmean, median

from launch import limits
from launch.run.tracking import METRICS_FILE
from launch.tools.bench.e2e import FOLDER, run
from qarl.config.io import load_config
from qarl.config.shipped import config_path

MODES = {
    "in turn": ["train.max_staleness=0"],
    "one step off": ["train.max_staleness=1"],
    "staleness 4": ["train.max_staleness=4", "rollout.stragglers.kind=keep"],
    "partial rollouts": ["train.max_staleness=4", "rollout.stragglers.kind=keep", "rollout.partial=true"],
}
HEADER = (
    "| mode | steps an hour | step, s | workers idle | learner idle | age, mean | ESS | continued | pass@1 |\n"
    "|---|---:|---:|---:|---:|---:|---:|---:|---:|"
)


def bench(config: str, overrides: Sequence[str], steps: int, rounds: int) -> Iterator[str]:
    """Table rows, after each run.

    Raises:
        ConfigError, ModelError, DataError: as `qarl train`.
        QarlError: a run failed; its log is named.
    """
    yield f"{config}: {rounds} rounds of {steps} steps, one warm-up step more, on {limits.cores()} cores\n\n{HEADER}"
    FOLDER.mkdir(parents=True, exist_ok=True)
    for number in range(1, rounds + 1):
        for mode, settings in MODES.items():
            own = [f"run.name=bench-loop-{mode.replace(' ', '-')}", "run.resume=false", f"train.steps={steps + 1}"]
            own += [f"eval.every={steps + 1}", f"train.checkpoint_every={steps + 1}"]
            items = [*overrides, *settings, *own]
            run([sys.executable, "-m", "launch.cli", "train", config, *items], FOLDER / f"{own[0][9:]}-{number}.log")
            folder = load_config(config_path(config), items).run.folder
            yield _row(mode, [json.loads(line) for line in (folder / METRICS_FILE).read_text().splitlines()])


def _row(mode: str, rows: Sequence[dict[str, float]]) -> str:
    measured = [row for row in rows if "timing_s/step" in row][1:]
    step = median(row["timing_s/step"] for row in measured)
    idle = [f"{fmean(row[f'perf/{role}_idle'] for row in measured):.0%}" for role in ("workers", "learner")]
    stale = [
        fmean(row.get(f"staleness/{name}", other) for row in measured)
        for name, other in (("age_mean", 0), ("ess", 1), ("continued", 0))
    ]
    accuracy = [row["eval/pass@1"] for row in rows if "eval/pass@1" in row][-1]
    cells = [f"{3600 / step:.0f}", f"{step:.2f}", *idle, *(f"{value:.2f}" for value in stale), f"{accuracy:.3f}"]
    return f"| {mode} | {' | '.join(cells)} |"

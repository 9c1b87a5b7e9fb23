"""`qarl bench loop`: a run in turn, one step off, and with samples up to four versions old, on the same work.

Each run has the same steps. The first one warms it up, and the last ones sample nothing more where sampling runs
ahead: neither counts. Of the others a row has the mean, as not every step publishes. Rows may differ in their rollouts:
with `rollout.stragglers.kind: keep` groups that are too old go back to the pool, and a step may have fewer.
Continued: how many responses of a step new weights had interrupted.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from statistics import fmean

from launch import limits
from launch.early import check_input
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
    "| mode | rollouts | steps an hour | step, s | workers idle | learner idle | age, mean | ESS | continued | pass@1 |"
    "\n|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|"
)


def bench(config: str, overrides: Sequence[str], steps: int, rounds: int) -> Iterator[str]:
    """Table rows, after each run.

    Raises:
        ConfigError, ModelError, DataError: as `qarl train`.
        QarlError: a run failed; its log is named.
    """
    modes = [load_config(config_path(config), [*overrides, *settings]) for settings in MODES.values()]
    for mode in modes:
        check_input(mode)
    more = 1 + max(mode.train.steps_ahead for mode in modes)
    counted = f"{rounds} rounds of {steps} steps, {more} more that do not count"
    yield f"{config}: {counted}, on {limits.cores()} cores\n\n{HEADER}"
    FOLDER.mkdir(parents=True, exist_ok=True)
    for number in range(1, rounds + 1):
        for name, settings in MODES.items():
            own = [f"run.name=bench-loop-{name.replace(' ', '-')}", "run.resume=false", f"train.steps={steps + more}"]
            own += [f"eval.every={steps + more}", f"train.checkpoint_every={steps + more}"]
            items = [*overrides, *settings, *own]
            run([sys.executable, "-m", "launch.cli", "train", config, *items], FOLDER / f"{own[0][9:]}-{number}.log")
            folder = load_config(config_path(config), items).run.folder
            rows = [json.loads(line) for line in (folder / METRICS_FILE).read_text().splitlines()]
            yield _row(name, rows, steps)


def _row(mode: str, rows: Sequence[dict[str, float]], steps: int) -> str:
    first, *measured = [row for row in rows if "timing_s/step" in row][: 1 + steps]
    rollouts = measured[-1]["training/rollouts"] - first["training/rollouts"]
    step = fmean(row["timing_s/step"] for row in measured)
    idle = [f"{fmean(row[f'perf/{role}_idle'] for row in measured):.0%}" for role in ("workers", "learner")]
    stale = [
        fmean(row.get(f"staleness/{name}", other) for row in measured)
        for name, other in (("age_mean", 0), ("ess", 1), ("continued", 0))
    ]
    accuracy = [row["eval/pass@1"] for row in rows if "eval/pass@1" in row][-1]
    cells = [f"{rollouts:.0f}", f"{3600 / step:.0f}", f"{step:.2f}", *idle]
    cells += [*(f"{value:.2f}" for value in stale), f"{accuracy:.3f}"]
    return f"| {mode} | {' | '.join(cells)} |"

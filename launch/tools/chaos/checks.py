"""What a disturbed run must have in common with one that nobody has disturbed."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from launch.run.resume import config_of_run
from launch.run.tracking import METRICS_FILE, SAMPLES_FILE, read_log
from qarl.prompts.state import COLUMNS, unpack

Counts = Counter[str]


def differences(run: Path, reference: Path) -> list[str]:
    """The disturbed run against the other: what is not the same, bit for bit, but for times."""
    parts = {"metrics": rows, "samples": samples, "weights": weights, "files": files, "pool": pool}
    return [f"other {what}" for what, read in parts.items() if read(run) != read(reference)]


def rows(run: Path) -> list[dict[str, Any]]:
    """The metrics but for times, in their order."""
    timed = ("time", "timing_s/", "perf/", "memory/", "system/")
    return [{k: v for k, v in row.items() if not k.startswith(timed)} for row in read_log(run / METRICS_FILE)]


def samples(run: Path) -> str:
    return (run / SAMPLES_FILE).read_text()


def weights(run: Path) -> bytes:
    return (run / "final" / "model.safetensors").read_bytes()


def files(run: Path) -> list[str]:
    """Names of all files: a lock or a part of a file that is left shows here."""
    return sorted(str(path.relative_to(run.parent)) for path in run.parent.rglob("*"))


def pool(run: Path) -> dict[str, Any]:
    """The prompt pool of the last checkpoint: what it knows of each prompt."""
    state: dict[str, Any] = _states(run)[-1]["pool"]
    return state


def lost_and_doubled(run: Path, reference: Path) -> tuple[dict[str, int], dict[str, int]]:
    """What a run that has ended has too few of and too many of, by name, with how many.

    Rows of the log are compared with the undisturbed run. The responses of each step are compared with
    `train.prompts_per_step` groups of `train.group_size`; those that the pool was told with those that the steps had;
    the prompts that are in flight in the pool with those of the collector, in each checkpoint that is left; and no
    result may come for a prompt that is not in flight.
    """
    lost, doubled = Counts(), Counts()
    states = _states(run)
    for there, expected in (
        (_rows(run), _rows(reference)),
        _responses(run, reference),
        _told(run, states[-1]),
        *map(_in_flight, states),
    ):
        lost += expected - there
        doubled += there - expected
    return dict(lost), dict(doubled)


def _states(run: Path) -> list[dict[str, Any]]:
    """The state of each checkpoint, oldest first."""
    return [json.loads(file.read_text()) for file in sorted((run / "checkpoints").glob("step_*/state.json"))]


def _trained(run: Path) -> list[tuple[int, int]]:
    """Steps that trained, with the responses of the run up to their end."""
    rows = read_log(run / METRICS_FILE)
    return [(row["step"], int(row["training/rollouts"])) for row in rows if "training/rollouts" in row]


def _rows(run: Path) -> Counts:
    return Counts(f"rows of step {step:06d}" for step, _ in _trained(run))


def _responses(run: Path, reference: Path) -> tuple[Counts, Counts]:
    """The responses of each step, and how many it should have. Nothing where that is not known: groups are given back,
    drawn again or of several sizes, or the undisturbed run lacked prompts, too."""
    config = config_of_run(run)
    size = config.train.prompts_per_step * config.train.group_size
    is_known = config.train.allocation == "equal" and not config.train.dynamic_sampling
    is_known &= config.rollout.stragglers.kind == "wait"
    if not is_known or any(count != step * size for step, count in _trained(reference)):
        return Counts(), Counts()
    there, expected = Counts(), Counts()
    before = (0, 0)
    for step, count in sorted(dict(_trained(run)).items()):
        name = f"responses of step {step:06d}"
        there[name], expected[name] = count - before[1], (step - before[0]) * size
        before = (step, count)
    return there, expected


def _told(run: Path, state: dict[str, Any]) -> tuple[Counts, Counts]:
    """What the pool was told, and the responses of all steps; these only where groups have one size and the pool has
    forgotten no prompt."""
    train, pool = config_of_run(run).train, state["pool"]
    gauges, archive = pool["gauges"], pool["archive"]
    there, expected = Counts({"results of prompts not in flight": gauges["unknown_results"]}), Counts()
    if train.allocation == "equal" and gauges["evicted"] - gauges["reinserted"] == len(archive):
        visits = sum(unpack(COLUMNS["visits"], pool["columns"]["visits"], len(pool["ids"])))
        visits += sum(old["row"]["visits"] for old in archive.values())
        name = "responses that the pool was told"
        there[name], expected[name] = visits * train.group_size, state["progress"]["rollouts"]
    return there, expected


def _in_flight(state: dict[str, Any]) -> tuple[Counts, Counts]:
    """The prompts that the collector waits for, and those that the pool has in flight."""
    name = f"draws of prompt {{}} in flight after step {state['step']:06d}"
    collector = [prompt_id for prompt_id, _ in state.get("in_flight", [])]
    return Counts(map(name.format, collector)), Counts(map(name.format, state["pool"]["in_flight"]))

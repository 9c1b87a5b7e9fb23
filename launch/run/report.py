"""What a run writes for its reader: curves.png, report.html, summary.json, and the summary in the terminal."""

from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from hashlib import file_digest
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError
from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from launch.run.curves import Series, draw_curves
from launch.run.files import SUMMARY_FILE, write_whole
from launch.run.gaps import GAPS_FILE, read_gaps
from launch.run.page.build import PageRun, build_page
from launch.run.page.panels import with_rest
from launch.run.resume import check_is_run
from launch.run.spans import newest_step, read_spans
from launch.run.tracking import METRICS_FILE, SAMPLES_FILE, number, read_log
from qarl.config.run import Config
from qarl.config.schedule import schemes_of
from qarl.errors import DataError
from qarl.types import WorkerInfo
from trainer.loop import Progress

CURVES_FILE = "curves.png"
REPORT_FILE = "report.html"


class Summary(BaseModel):
    """The outcome of one run.

    Keys of `eval_before` and `eval_after` are those of `eval/...` metrics: "greedy", "pass@1", "level_06/pass@1".
    `controls` has for example "teacher" and "sft_continued/pass@1". Both mismatches have the mean and max of
    |d log p| (nats) and the k3 estimate of the KL: "mean", "max", "k3"; empty when not measured. `weights_sha256` is of
    the final model's file of weights.
    """

    # Non-finite numbers become strings: plain JSON has none.
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")

    run: str
    scheme: str
    kernels: list[str]
    steps: int
    rollouts: int
    train_seconds: float
    tokens_per_s: float
    eval_before: dict[str, float]
    eval_after: dict[str, float]
    controls: dict[str, float] = {}
    mismatch_aligned: dict[str, float] = {}
    mismatch_unaligned: dict[str, float] = {}
    files: dict[str, str] = {}
    weights_sha256: str = ""


def make_summary(
    config: Config,
    run_dir: Path,
    infos: Sequence[WorkerInfo],
    progress: Progress,
    after: dict[str, float],
    controls: dict[str, float],
    files: Mapping[str, str],
) -> Summary:
    """The summary of a finished run: `after` is its last evaluation, `files` what it exported."""
    rows = read_log(run_dir / METRICS_FILE)
    with Path(files["final model"], "model.safetensors").open("rb") as weights:
        digest = file_digest(weights, "sha256").hexdigest()
    return Summary(
        run=config.run.name,
        scheme=" then ".join(scheme.label for scheme in schemes_of(config.rollout)),
        kernels=sorted({kernel for info in infos for kernel in info.kernels}),
        steps=progress.step,
        rollouts=progress.rollouts,
        train_seconds=progress.train_seconds,
        tokens_per_s=progress.tokens / progress.train_seconds,
        eval_before=progress.eval_before,
        eval_after=after,
        controls=controls,
        mismatch_aligned=_mean_mismatch(rows, "mismatch/"),
        mismatch_unaligned=_mean_mismatch(rows, "mismatch/unaligned_"),
        files={**files, "report": str(run_dir / REPORT_FILE), "curves": str(run_dir / CURVES_FILE)},
        weights_sha256=digest,
    )


def _mean_mismatch(rows: Sequence[dict[str, Any]], prefix: str) -> dict[str, float]:
    """Over all logged steps: mean of the means, largest maximum, mean k3."""
    found = [row for row in rows if f"{prefix}logp_abs_mean" in row]
    if not found:
        return {}
    return {
        "mean": fmean(float(row[f"{prefix}logp_abs_mean"]) for row in found),
        "max": float(np.max([float(row[f"{prefix}logp_abs_max"]) for row in found])),  # keeps NaN
        "k3": fmean(float(row[f"{prefix}k3_kl"]) for row in found),
    }


def read_summary(run_dir: Path) -> Summary:
    """The summary that `write_report` left in `run_dir`. Raises DataError when there is none, or it is damaged."""
    path = run_dir / SUMMARY_FILE
    if not path.is_file():
        if rows := read_log(run_dir / METRICS_FILE):
            what = f"the run has not ended: step {max(row['step'] for row in rows)} is its last so far"
            raise DataError(what, str(run_dir), "`qarl train` continues it, and writes the report at its end")
        raise DataError("no summary", where=str(path), hint="it is written when a run ends")
    try:
        return Summary.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        reason = f"{key} {first['msg'].lower()}".strip()
        hint = "delete it, and `qarl train` writes it again"
        raise DataError(f"not a run summary: {reason}", str(path), hint) from error


def final_summary(run_dir: Path) -> Summary | None:
    """The summary of a run that has ended; None where it has not, and where it was given more steps and goes on.

    Raises DataError: the summary, or the log, is damaged.
    """
    if not (run_dir / SUMMARY_FILE).is_file():
        return None
    summary = read_summary(run_dir)
    logged = max((row["step"] for row in read_log(run_dir / METRICS_FILE)), default=0)
    return summary if summary.steps >= logged else None


def read_series(run_dir: Path) -> Series:
    """Every number of metrics.jsonl by step. Raises DataError when there are none or the file is damaged."""
    series: Series = {}
    for row in read_log(run_dir / METRICS_FILE):
        for name in row.keys() - {"step", "time"}:
            if not isinstance(row[name], dict):  # a histogram
                series.setdefault(name, {})[row["step"]] = number(row[name], f"{run_dir / METRICS_FILE}, {name}")
    if not series:
        check_is_run(run_dir)
        raise DataError("no metrics", where=str(run_dir / METRICS_FILE), hint="nothing has been logged yet")
    return dict(sorted(series.items()))


def write_report(run_dir: Path, summary: Summary) -> None:
    """Write summary.json, curves.png and report.html (one self-contained page) into `run_dir`.

    Raises DataError: `run_dir` has no metrics.jsonl, or a damaged one.
    """
    series = read_series(run_dir)
    controls = {_control_name(key): value for key, value in summary.controls.items()}
    picture = draw_curves(series, f"{summary.run}  ({summary.scheme})", controls)
    (run_dir / CURVES_FILE).write_bytes(picture)
    write_page([run_dir], run_dir / REPORT_FILE, [summary])
    write_whole(run_dir / SUMMARY_FILE, summary.model_dump_json(indent=2))  # last: it marks the run as complete


def run_names(run_dirs: Sequence[Path], summaries: Sequence[Summary | None]) -> list[str]:
    """What the runs are called beside each other: those of one name by their paths."""
    names = [summary.run if summary else path.name for path, summary in zip(run_dirs, summaries, strict=True)]
    return [str(path) if names.count(name) > 1 else name for name, path in zip(names, run_dirs, strict=True)]


def write_page(run_dirs: Sequence[Path], out: Path, summaries: Sequence[Summary | None]) -> None:
    """Write one page that shows the runs side by side; a run that has not ended has no summary.

    Raises DataError: a run has no metrics, or damaged ones.
    """
    names = run_names(run_dirs, summaries)
    runs = [_page_run(*run) for run in zip(names, run_dirs, summaries, strict=True)]
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, build_page(runs, " and ".join(run.name for run in runs) if len(runs) < 3 else f"{len(runs)} runs"))


def _page_run(name: str, run_dir: Path, summary: Summary | None) -> PageRun:
    series = read_series(run_dir)
    last = max(max(points) for points in series.values())
    lead = f"not ended, step {last} is the last so far"
    if summary:
        lead = f"{summary.scheme}, {summary.steps:,} steps, {summary.rollouts:,} rollouts"
    controls = {_control_name(key): value for key, value in summary.controls.items()} if summary else {}
    tables = list(_tables(summary)) if summary else []
    samples = read_log(run_dir / SAMPLES_FILE)
    return PageRun(
        name,
        lead,
        with_rest(series),
        tables,
        controls,
        samples,
        newest_step(read_spans(run_dir)),
        read_gaps(run_dir / GAPS_FILE),
    )


def render_summary(summary: Summary) -> RenderableType:
    """The summary as tables for the terminal."""
    parts: list[RenderableType] = []
    for title, header, rows in _tables(summary):
        table = Table(box=SIMPLE_HEAD, show_header=any(header), header_style="dim", show_edge=False)
        for i, name in enumerate(header):
            table.add_column(name, justify="left" if i == 0 or not any(header) else "right", overflow="fold")
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        parts += [Text(f"\n{title}", style="bold cyan"), table]
    return Group(*parts)


# --- tables, the same for the terminal and the page


def _tables(summary: Summary) -> Iterator[tuple[str, Sequence[str], list[Sequence[str]]]]:
    """(title, header, rows) of every table that has rows."""
    yield (
        "Run",
        ("", ""),
        [
            ("name", summary.run),
            ("scheme", summary.scheme),
            ("kernels selected", ", ".join(summary.kernels) or "-"),
            ("steps, rollouts", f"{summary.steps:,}, {summary.rollouts:,}"),
            ("training time", str(timedelta(seconds=round(summary.train_seconds)))),
            ("tokens/s", f"{summary.tokens_per_s:,.0f}"),
        ],
    )
    header, rows = _accuracy(summary.eval_before, summary.eval_after)
    if rows:
        yield "Held-out accuracy, before -> after training", header, rows
    if summary.controls:
        controls = [(_control_name(key), f"{value:.3f}") for key, value in summary.controls.items()]
        yield "Controls: held-out accuracy without RL", ("control", "accuracy"), list(controls)
    names = {"mean": "mean |d log p|", "max": "max |d log p|", "k3": "k3 KL"}
    sides = (summary.mismatch_aligned, summary.mismatch_unaligned)
    if any(sides):
        compared = [(name, *(mismatch_text(side.get(key)) for side in sides)) for key, name in names.items()]
        yield "Learner against sampler (nats)", ("", "aligned", "unaligned"), list(compared)
    if summary.files:
        digest = [("its SHA-256", f"{summary.weights_sha256[:16]}...")] if summary.weights_sha256 else []
        first, *others = summary.files.items()
        yield "Files", ("", ""), [first, *digest, *others]


def _accuracy(before: Mapping[str, float], after: Mapping[str, float]) -> tuple[list[str], list[Sequence[str]]]:
    """A row for all prompts and one for each level; a column for each way to measure."""
    keys = list(dict.fromkeys([*before, *after]))
    measures = list(dict.fromkeys(key.rpartition("/")[2] for key in keys))
    if all(side.get("mean_reward") == side.get("pass@1") for side in (before, after)):  # no reward is a part
        measures = [measure for measure in measures if measure != "mean_reward"]
    groups = sorted({key.rpartition("/")[0] for key in keys})
    rows: list[Sequence[str]] = []
    for group in groups:
        cells = [f"{group}/{measure}".lstrip("/") for measure in measures]
        shown = [_change(before.get(key), after.get(key)) for key in cells]
        rows.append((group.replace("level_0", "level ").replace("level_", "level ") or "all", *shown))
    return ["", *measures], rows


def _change(before: float | None, after: float | None) -> str:
    if before is None and after is None:
        return "-"
    return " -> ".join("?" if value is None else f"{value:.3f}" for value in (before, after))


def mismatch_text(value: float | None) -> str:
    """A mismatch in nats, for people: zero means equal bits."""
    if value is None:
        return "not measured"
    return "exactly 0" if value == 0 else f"{value:.2e}"


def _control_name(key: str) -> str:
    return key.replace("sft_continued", "SFT continued").replace("/", ", ")

"""What a run leaves for its reader: curves.png, report.html, summary.json, and the summary in the terminal."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from html import escape
from itertools import cycle
from pathlib import Path
from typing import ClassVar

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from pydantic import ConfigDict, TypeAdapter, ValidationError
from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from launch.run.curves import draw_augmentation, draw_histogram
from launch.run.tracking import METRICS_FILE, read_log
from qarl.errors import DataError

SUMMARY_FILE = "summary.json"
CURVES_FILE = "curves.png"
REPORT_FILE = "report.html"

Series = dict[str, dict[int, float]]
"""Metric name -> step -> value."""

BLUE, ORANGE, GREEN, PINK, SKY, GREY = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#9a9a9a"
PALETTE = (BLUE, ORANGE, GREEN, PINK, SKY, "#e69f00", "#000000", GREY)


@dataclass(frozen=True)
class Summary:
    """The outcome of one run.

    Keys of `eval_before` and `eval_after` are those of `eval/...` metrics: "greedy", "pass@1", "level_06/pass@1".
    `controls` has for example "teacher" and "sft_continued/pass@1". Both mismatches have the mean and max of
    |d log p| (nats) and the k3 estimate of the KL: "mean", "max", "k3"; empty when not measured.
    """

    # Non-finite numbers become strings: plain JSON has none.
    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", ser_json_inf_nan="strings")

    run: str
    scheme: str
    kernels: list[str]
    steps: int
    rollouts: int
    train_seconds: float
    tokens_per_s: float
    eval_before: dict[str, float]
    eval_after: dict[str, float]
    controls: dict[str, float] = field(default_factory=dict)
    mismatch_aligned: dict[str, float] = field(default_factory=dict)
    mismatch_unaligned: dict[str, float] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        return _ADAPTER.dump_json(self, indent=2).decode()

    @staticmethod
    def from_json(text: str, where: str = SUMMARY_FILE) -> Summary:
        """Raises DataError when `text` is not what `to_json` writes."""
        try:
            return _ADAPTER.validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"]))
            raise DataError(f"not a run summary: {key} {first['msg'].lower()}", where=where) from None


_ADAPTER = TypeAdapter(Summary)


def read_summary(run_dir: Path) -> Summary:
    """The summary that `write_report` left in `run_dir`. Raises DataError when there is none."""
    path = run_dir / SUMMARY_FILE
    if not path.is_file():
        raise DataError("no summary", where=str(path), mend="it is written when a run ends")
    return Summary.from_json(path.read_text(encoding="utf-8"), str(path))


def read_series(run_dir: Path) -> Series:
    """Every number of metrics.jsonl by step. Raises DataError when there are none or the file is damaged."""
    series: Series = {}
    for row in read_log(run_dir / METRICS_FILE):
        for name in row.keys() - {"step", "time"}:
            if not isinstance(row[name], dict):  # a histogram
                series.setdefault(name, {})[row["step"]] = float(row[name])
    if not series:
        raise DataError("no metrics", where=str(run_dir / METRICS_FILE), mend="nothing has been logged yet")
    return dict(sorted(series.items()))


def write_report(run_dir: Path, summary: Summary) -> None:
    """Write summary.json, curves.png and report.html (one self-contained page) into `run_dir`.

    Raises:
        DataError: `run_dir` has no metrics.jsonl, or a damaged one.
    """
    series = read_series(run_dir)
    picture = draw_curves(series, summary)
    (run_dir / SUMMARY_FILE).write_text(summary.to_json(), encoding="utf-8")
    (run_dir / CURVES_FILE).write_bytes(picture)
    (run_dir / REPORT_FILE).write_text(_page(summary, series, picture), encoding="utf-8")


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
        compared = [(name, *(_mismatch(side.get(key)) for side in sides)) for key, name in names.items()]
        yield "Learner against sampler (nats)", ("", "aligned", "unaligned"), list(compared)
    if summary.files:
        yield "Files", ("", ""), list(summary.files.items())


def _accuracy(before: Mapping[str, float], after: Mapping[str, float]) -> tuple[list[str], list[Sequence[str]]]:
    """A row for all prompts and one for each level; a column for each way to measure."""
    keys = list(dict.fromkeys([*before, *after]))
    measures = list(dict.fromkeys(key.rpartition("/")[2] for key in keys))
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


def _mismatch(value: float | None) -> str:
    if value is None:
        return "not measured"
    return "exactly 0" if value == 0 else f"{value:.2e}"


def _control_name(key: str) -> str:
    return key.replace("sft_continued", "SFT continued").replace("/", ", ")


# --- the picture


def draw_curves(series: Series, summary: Summary) -> bytes:
    """Eight panels over training steps, as PNG bytes."""
    figure = Figure(figsize=(15, 16.5), layout=ConstrainedLayoutEngine(hspace=0.06, wspace=0.04))
    figure.suptitle(f"{summary.run}  ({summary.scheme})", fontsize=16, fontweight="bold")
    axes = figure.subplots(4, 2).flat
    panels = {
        "Reward": _draw_reward,
        "Held-out accuracy": _draw_accuracy,
        "Learner against sampler, |d log p|": _draw_mismatch,
        "Where a step's time goes": _draw_times,
        "Share clipped": _draw_clipping,
        "Prompt pool": _draw_pool,
        "Prompt pool, success rates": lambda ax, series, _: draw_histogram(ax, series),
        "Problems made by the policy": lambda ax, series, _: draw_augmentation(ax, series),
    }
    for ax, (title, draw) in zip(axes, panels.items(), strict=True):
        ax.set_title(title, loc="left", fontsize=12, fontweight="bold")
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", color="#e6e6e6", linewidth=0.8)
        ax.set_axisbelow(True)
        ax.margins(x=0.02)
        ax.set_xlabel("step")
        draw(ax, series, summary)
        if ax.has_data():
            ax.xaxis.get_major_locator().set_params(integer=True)
            reverse = draw is _draw_times  # the legend of a stack reads from the top
            if ax.get_legend_handles_labels()[0]:
                ax.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1.0, 1.0), reverse=reverse)
        else:
            ax.text(0.5, 0.5, "not measured in this run", ha="center", color=GREY, transform=ax.transAxes)
            ax.set(xticks=[], yticks=[])
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return file.getvalue()


def _line(ax: Axes, points: Mapping[int, float], color: str, label: str, marker: str = "", style: str = "-") -> None:
    ax.plot(list(points), list(points.values()), style, color=color, label=label, marker=marker, markersize=4, lw=1.8)


def _draw_reward(ax: Axes, series: Series, summary: Summary) -> None:
    points = series.get("reward/mean", {})
    if points:
        ax.plot(list(points), list(points.values()), color=SKY, linewidth=1, alpha=0.8, label="mean of a step")
        window = max(1, len(points) // 10)
        values = list(points.values())
        means = [sum(part := values[max(0, i - window + 1) : i + 1]) / len(part) for i in range(len(values))]
        _line(ax, dict(zip(points, means, strict=True)), BLUE, f"mean of {window} steps")
        ax.set_ylim(0, 1.03)


def _draw_accuracy(ax: Axes, series: Series, summary: Summary) -> None:
    overall = {n.removeprefix("eval/"): v for n, v in series.items() if n.startswith("eval/") and n.count("/") == 1}
    for color, (name, points) in zip(PALETTE, overall.items(), strict=False):
        _line(ax, points, color, name, marker="o")
    if overall:
        for style, (key, value) in zip(cycle(("--", ":", "-.", (0, (1, 3)))), summary.controls.items(), strict=False):
            ax.axhline(value, color="#444444", linestyle=style, linewidth=1.2, label=f"{_control_name(key)}\n(control)")
        ax.set_ylim(0, 1.03)


def _draw_mismatch(ax: Axes, series: Series, summary: Summary) -> None:
    """Logarithmic, with the zeros, which a log axis lacks, on a floor of their own."""
    lines = {
        "unaligned, max": ("mismatch/unaligned_logp_abs_max", ORANGE),
        "unaligned, mean": ("mismatch/unaligned_logp_abs_mean", "#eda46f"),
        "aligned, max": ("mismatch/logp_abs_max", BLUE),
        "aligned, mean": ("mismatch/logp_abs_mean", SKY),
    }
    drawn = {label: (series[name], color) for label, (name, color) in lines.items() if name in series}
    values = [value for points, _ in drawn.values() for value in points.values()]
    positive = [value for value in values if 0 < value < math.inf]
    if not drawn:
        return
    low = min(-5, math.floor(math.log10(min(positive, default=1e-5))))
    high = max(0, math.ceil(math.log10(max(positive, default=1.0))))
    floor = 10.0 ** (low - 1)
    ax.set_yscale("log")
    for label, (points, color) in drawn.items():
        zero = "\n(exactly 0)" if not any(points.values()) else ""
        on_floor = {step: max(value, floor) for step, value in points.items()}
        # Mean and max of nothing but zeros coincide: the wide max stays visible under the mean.
        wide = 4.0 if label.endswith("max") else 1.8
        ax.plot(list(on_floor), list(on_floor.values()), color=color, label=label + zero, linewidth=wide)
    decades = range(low, high + 1, max(1, (high - low) // 6))
    ax.set_yticks([floor, *(10.0**d for d in decades)], ["exactly 0", *(f"1e{d}" for d in decades)])
    ax.minorticks_off()
    ax.axhspan(floor / 4, floor * 3, color="#f1f5f9", zorder=0)
    ax.set_ylim(floor / 4, 10.0**high * 2)
    ax.set_ylabel("nats")


def _draw_times(ax: Axes, series: Series, summary: Summary) -> None:
    total = series.get("timing_s/step", {})
    steps = list(total)
    if not steps:
        return
    names = ("pool", "sample", "reward", "prox", "update", "publish")
    parts = {name: [series.get(f"timing_s/{name}", {}).get(s, 0.0) for s in steps] for name in names}
    parts["other"] = [max(0.0, total[s] - sum(part[i] for part in parts.values())) for i, s in enumerate(steps)]
    # A step is drawn as wide as it is, so that a run of one step shows too.
    edges = [edge for s in steps for edge in (s - 0.5, s + 0.5)]
    heights = [[value for value in part for _ in range(2)] for part in parts.values()]
    ax.stackplot(edges, heights, labels=list(parts), colors=[*PALETTE[:6], "#d0d0d0"], linewidth=0, alpha=0.85)
    ax.set_ylabel("seconds")


def _draw_clipping(ax: Axes, series: Series, summary: Summary) -> None:
    names = [name for name in series if name.startswith("actor/") and "clip" in name]
    for color, name in zip(PALETTE, names, strict=False):
        _line(ax, series[name], color, name.removeprefix("actor/"))
    if names:
        ax.set_ylim(bottom=0)


def _draw_pool(ax: Axes, series: Series, summary: Summary) -> None:
    """Counts only: shares and rates, at most 1, would lie on the axis."""
    sizes = [name for name, points in series.items() if name.startswith("pool/") and max(points.values()) > 1]
    looks = ((color, style) for style in ("-", "--", ":") for color in PALETTE)
    for (color, style), name in zip(looks, sizes, strict=False):
        _line(ax, series[name], color, name.removeprefix("pool/"), style=style)
    if sizes:
        ax.set_ylabel("prompts")
        ax.set_ylim(bottom=0)


# --- the page

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2933; max-width: 1080px; margin: 2.5rem auto; padding: 0 1rem }
h1 { margin-bottom: .2rem } h2 { font-size: 1.05rem; margin: 1.8rem 0 .4rem } img { width: 100%; margin-top: 1.5rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums } th { text-align: left; color: #52606d }
td, th { padding: .25rem 1.4rem .25rem 0; border-bottom: 1px solid #e4e7eb; overflow-wrap: anywhere }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(420px, 1fr)); column-gap: 3rem }
.lead { color: #52606d; margin: 0 } summary { cursor: pointer; margin-top: 1.8rem; font-weight: bold }
"""


def _page(summary: Summary, series: Series, picture: bytes) -> str:
    tables = "".join(
        f"<section><h2>{escape(title)}</h2>{_html_table(header, rows)}</section>"
        for title, header, rows in _tables(summary)
    )
    header = ("metric", "steps", "first", "last", "smallest", "largest")
    rows = [
        (name, str(len(v)), *(f"{x:.4g}" for x in (v[0], v[-1], min(v), max(v))))
        for name, v in ((name, list(points.values())) for name, points in series.items())
    ]
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{escape(summary.run)}</title><style>{STYLE}</style></head><body>
<h1>{escape(summary.run)}</h1>
<p class="lead">{escape(summary.scheme)}, {summary.steps:,} steps, {summary.rollouts:,} rollouts</p>
<img alt="training curves" src="data:image/png;base64,{base64.b64encode(picture).decode()}">
<div class="columns">{tables}</div>
<details><summary>Every metric</summary>{_html_table(header, rows)}</details>
</body></html>
"""


def _html_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = f"<tr>{''.join(f'<th>{escape(name)}</th>' for name in header)}</tr>" if any(header) else ""
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table>{head}{body}</table>".replace("-&gt;", "→")

"""What a study writes: one Markdown page with a table and a figure for each comparison."""

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean

from matplotlib.axes import Axes

from launch.run.curves import PALETTE, STYLES, new_figure, png, prepare
from launch.tools.study.arms import PlannedRun, RunResult, Study
from qarl.config.shipped import config_path

ROLLOUTS = "training/rollouts"
NOTES = """\
Mean over the seeds, smallest to largest in brackets. *Final*: held-out accuracy after training, of the runs that ended.
*Collapsed*: runs that ended more than {margin:g} below their start or their best, or that stopped because a log-prob
was no longer finite; such a run leaves the curves where it stops.
*Rollouts*: responses sampled until held-out accuracy is {level}, interpolated between evaluations, over the runs that
reach it ({origin})."""


def write_study_report(study: Study, runs: Sequence[PlannedRun], results: Sequence[RunResult], out: Path) -> Path:
    """Write `out`/NAME.md and a PNG for each comparison; returns the page.

    What was written by hand into `out`/NAME.findings.md follows the question.
    """
    out.mkdir(parents=True, exist_ok=True)
    page = out / f"{study.name}.md"
    chosen = {
        title: kept
        for title, arms in (study.config.comparisons or {"All arms": list(study.config.arms)}).items()
        if (kept := [arm for arm in arms if arm in study.arms])
    }
    parts = [_head(study, runs[0], out / f"{study.name}.findings.md")]
    for title, arms in chosen.items():
        by_arm = {arm: [result for result in results if result.arm == arm] for arm in arms}
        picture = f"{study.name}-{re.sub('[^a-z0-9]+', '-', title.lower()).strip('-')}.png"
        (out / picture).write_bytes(draw(study, by_arm))
        parts += [f"## {title}", table(study, by_arm), f"![{title}]({picture})"]
    parts.append(_settings(study, [arm for arm in study.arms if any(arm in arms for arms in chosen.values())]))
    if troubles := [
        f"- {r.arm}, seed {r.seed}: {r.status}. {r.reason}".rstrip(". ") for r in results if r.status != "done"
    ]:
        parts.append("## Runs that did not end well\n\n" + "\n".join(troubles))
    page.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return page


def final_accuracy(result: RunResult, metric: str) -> float | None:
    """The last evaluation of a run that ended."""
    points = result.series.get(metric, {})
    return points[max(points)] if result.status == "done" and points else None


def collapsed(result: RunResult, metric: str, margin: float) -> bool:
    """Whether the run ended more than `margin` below its best (its start included), or diverged."""
    final = final_accuracy(result, metric)
    points = result.series.get(metric, {})
    return result.status == "diverged" or (final is not None and final < max(points.values()) - margin)


def common_level(by_arm: dict[str, list[RunResult]], metric: str) -> float | None:
    """The highest accuracy that every arm reaches: the lowest of the arms' best, each on its mean over the seeds."""
    curves = [_by_step(results, metric).values() for results in by_arm.values()]
    return min((max(map(fmean, values)) for values in curves if values), default=None)


def rollouts_to(result: RunResult, metric: str, level: float) -> float | None:
    """Rollouts at which the accuracy first reaches `level`, on the line between two evaluations."""
    made = result.series.get(ROLLOUTS, {})
    before = None
    for step, value in sorted(result.series.get(metric, {}).items()):
        at = made.get(step, 0.0)
        if value >= level:
            if before is None or value == before[1]:
                return at
            return before[0] + (at - before[0]) * (level - before[1]) / (value - before[1])
        before = at, value
    return None


def _by_step(results: Sequence[RunResult], metric: str) -> dict[int, list[float]]:
    """By step, the values of the runs that logged the metric there."""
    found: dict[int, list[float]] = {}
    for result in results:
        for step, value in result.series.get(metric, {}).items():
            found.setdefault(step, []).append(value)
    return dict(sorted(found.items()))


# --- the page


def _head(study: Study, run: PlannedRun, findings: Path) -> str:
    train, evaluation = run.config.train, run.config.eval
    facts = [
        f"base config `{Path(study.config.base).stem}`",
        f"{train.steps} steps of {train.prompts_per_step} prompts x {train.group_size} responses",
        f"{evaluation.final_num_prompts} held-out prompts x {evaluation.num_samples} samples before and after, "
        f"{evaluation.num_prompts} each {evaluation.every} steps",
        f"seeds {', '.join(map(str, study.seeds))}",
    ]
    lines = [f"# Study: {study.name}", study.config.question.strip()]
    lines += [findings.read_text().strip()] if findings.is_file() else []
    lines += [f"Made by `{_command(study)}`: " + "; ".join(facts) + "."]
    return "\n\n".join(lines)


def _command(study: Study) -> str:
    seeds = [] if list(study.seeds) == study.config.seeds else ["--seeds", *map(str, study.seeds)]
    arms = [] if list(study.arms) == list(study.config.arms) else ["--arms", *study.arms]
    name = study.name if config_path(study.name, "study") == study.path else str(study.path)
    return " ".join(["qarl study", name, *arms, *seeds])


def table(study: Study, by_arm: dict[str, list[RunResult]]) -> str:
    """One row for each arm."""
    config, metric = study.config, study.config.accuracy
    level = config.reach if config.reach is not None else common_level(by_arm, metric)
    names = [*config.means, *(f"share of step: {name.removeprefix('timing_s/')}" for name in config.time_shares)]
    header = ["arm", "start", "final", "collapsed", "failed", "rollouts", *names]
    rows = []
    for arm, results in by_arm.items():
        starts = [points[min(points)] for result in results if (points := result.series.get(metric))]
        finals = [value for result in results if (value := final_accuracy(result, metric)) is not None]
        reached = [
            n for result in results if level is not None and (n := rollouts_to(result, metric, level)) is not None
        ]
        ended = [result for result in results if result.status in {"done", "diverged"}]
        cells = [
            arm,
            spread(starts),
            spread(finals),
            f"{sum(collapsed(result, metric, config.collapse_margin) for result in results)} of {len(ended)}",
            str(sum(result.status == "failed" for result in results)),
            spread(reached, "{:,.0f}") + (f", {len(reached)} of {len(ended)}" if len(reached) < len(ended) else ""),
        ]
        for name in config.means:
            means = [fmean(points.values()) for result in results if (points := result.series.get(name))]
            cells.append(spread(means, "{:.3g}"))
        cells += [spread(_shares(results, name), "{:.2%}") for name in config.time_shares]
        rows.append(cells)
    lines = [header, ["---"] * len(header), *rows]
    origin = "given" if config.reach is not None else "the highest that all arms reach on average"
    notes = NOTES.format(margin=config.collapse_margin, level="-" if level is None else f"{level:.3f}", origin=origin)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\n{notes}"


def spread(values: Sequence[float], format_: str = "{:.3f}") -> str:
    """For example "0.81 (0.79 to 0.84)"."""
    if not values:
        return "-"
    if min(values) == max(values):
        return format_.format(values[0])
    return f"{format_.format(fmean(values))} ({format_.format(min(values))} to {format_.format(max(values))})"


def _shares(results: Sequence[RunResult], metric: str) -> list[float]:
    """Of each run, the time of `metric` in the time of its steps; a step that does not log it took none."""
    totals = [sum(result.series.get("timing_s/step", {}).values()) for result in results]
    parts = [sum(result.series.get(metric, {}).values()) for result in results]
    return [part / total for part, total in zip(parts, totals, strict=True) if total]


def _settings(study: Study, arms: Sequence[str]) -> str:
    common = " ".join(f"`{item}`" for item in study.config.overrides) or "nothing"
    lines = ["| arm | settings |", "|---|---|"]
    lines += [
        f"| {arm} | {' '.join(f'`{item}`' for item in study.config.items(arm)) or 'as the base'} |" for arm in arms
    ]
    return f"## Settings\n\nSet in every run, over the base config: {common}.\n\n" + "\n".join(lines)


# --- the figure


def draw(study: Study, by_arm: dict[str, list[RunResult]]) -> bytes:
    """One panel for each metric: the mean over the seeds, and the range from smallest to largest, as PNG bytes."""
    curves = study.config.curves
    rows = -(-len(curves) // 2)
    figure = new_figure(4.2 * rows + 0.6)
    axes = list(figure.subplots(rows, 2, squeeze=False).flat)
    for ax, metric in zip(axes, curves, strict=False):
        prepare(ax, metric)
        for number, (arm, results) in enumerate(by_arm.items()):
            _draw_arm(ax, number, arm, _by_step(results, metric))
        _choose_scale(ax, [v for r in by_arm.values() for vs in _by_step(r, metric).values() for v in vs])
    for ax in axes[len(curves) :]:
        ax.set_axis_off()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=10)
    return png(figure, dpi=80)


def _draw_arm(ax: Axes, number: int, arm: str, by_step: dict[int, list[float]]) -> None:
    color, style = PALETTE[number % len(PALETTE)], STYLES[number // len(PALETTE) % len(STYLES)]
    steps = list(by_step)
    measures: tuple[Callable[[Sequence[float]], float], ...] = (fmean, min, max)
    mean, low, high = ([measure(values) for values in by_step.values()] for measure in measures)
    marker = "o" if len(steps) < 20 else ""
    ax.plot(steps, mean, color=color, linestyle=style, label=arm, marker=marker, markersize=4, linewidth=1.8)
    ax.fill_between(steps, low, high, color=color, alpha=0.12, linewidth=0)


def _choose_scale(ax: Axes, values: Sequence[float]) -> None:
    """Logarithmic, and linear about 0, where the values span more than three orders of magnitude."""
    sizes = [abs(value) for value in values if math.isfinite(value) and value]
    if sizes and max(sizes) > 1e3 * min(sizes):
        ax.set_yscale("symlog", linthresh=max(min(sizes), max(sizes) * 1e-8))

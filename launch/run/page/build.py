"""The report: one HTML page for any number of runs, which needs no network."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from itertools import groupby
from typing import Any

from launch.run.gaps import Cell
from launch.run.metric_table import HELD_OUT, describe
from launch.run.page.panels import PANELS, drawn

Series = Mapping[str, Mapping[int, float]]
"""Metric name -> step -> value."""
Tables = Sequence[tuple[str, Sequence[str], Sequence[Sequence[str]]]]
"""Title, header and rows of each table."""
MAX_SAMPLES = 400
"""Responses of a run in the page: the newest."""
MAX_TOKENS = 400_000
"""Tokens of all of a run's responses in the page: older responses are left out."""
MAX_POINTS = 2000
"""Points of a metric in the page, about: of more, one of every two, three, ... steps is shown, and the last."""
ASSETS = {
    "css": ("page.css",),
    "library": ("echarts.common.min.js",),
    "js": ("page.js", "samples.js", "start.js"),
}
"""What takes the places of page.html."""
LARGEST = 1e30
"""Larger values, and infinite ones, are left out: no axis can show them."""


@dataclass(frozen=True)
class PageRun:
    """What the page shows of one run.

    `controls` are levels of held-out accuracy by name, `samples` rows of samples.jsonl, `trace` is what `newest_step`
    returns, `gaps` are what `qarl mismatch` measured.
    """

    name: str
    lead: str
    series: Series
    tables: Tables
    controls: Mapping[str, float]
    samples: Sequence[Mapping[str, Any]]
    trace: Mapping[str, Any] | None = None
    gaps: Sequence[Cell] = ()


def build_page(runs: Sequence[PageRun], title: str, panels: Sequence[Mapping[str, Any]] | None = None) -> str:
    """The page. `panels` are drawn, or those of the report; panels of which no run has a metric are left out."""
    names = {name for run in runs for name in run.series}
    data = {
        "runs": [_data(run) for run in runs],
        "panels": drawn(PANELS, names) if panels is None else panels,
        "metrics": {name: _meaning(name) for name in sorted(names)},
    }
    # Within a script element only "</" and "<!--" end or change the text.
    text = json.dumps(_strict(data), ensure_ascii=False, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    heads = "".join(_head(run) for run in runs)
    page = _asset("page.html").replace("{{title}}", escape(title)).replace("{{runs}}", heads)
    for place, assets in ASSETS.items():
        page = page.replace(f"{{{{{place}}}}}", "".join(map(_asset, assets)))
    return page.replace("{{data}}", text)  # last: it may hold any text


def _data(run: PageRun) -> dict[str, Any]:
    every = max(1, math.ceil(max(map(len, run.series.values()), default=0) / MAX_POINTS))
    samples = _newest(run.samples)
    return {
        "name": run.name,
        "every": every,
        "series": {name: _columns(points, _shown(name, points, every)) for name, points in run.series.items()},
        "controls": dict(run.controls),
        "intervals": _intervals(run, every),
        "samples": samples,
        "older": len(run.samples) - len(samples),
        "trace": run.trace,
        "gaps": [_gaps(cell) for cell in run.gaps],
    }


def _asset(name: str) -> str:
    return (files("launch.run.page") / name).read_text(encoding="utf-8")


def _head(run: PageRun) -> str:
    tables = "".join(
        f"<section><h3>{escape(title)}</h3>{html_table(header, rows)}</section>" for title, header, rows in run.tables
    )
    return f'<article class="run"><h2>{escape(run.name)}</h2><p>{escape(run.lead)}</p><div>{tables}</div></article>'


def html_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str], scope: str, heads: int) -> str:
        """A row, whose first `heads` cells are headings."""
        parts = [f'<th scope="{scope}">{escape(cell)}</th>' for cell in cells[:heads]]
        return f"<tr>{''.join(parts + [f'<td>{escape(cell)}</td>' for cell in cells[heads:]])}</tr>"

    head = line(header, "col", len(header)) if any(header) else ""
    return f"<table>{head}{''.join(line(row, 'row', 1) for row in rows)}</table>".replace("-&gt;", "→")


def _shown(name: str, points: Mapping[int, float], every: int) -> list[int]:
    """One of every `every` steps, and the last: one whose value no axis can show, such as NaN, if there is one; of
    mismatch and of maxima the largest, so that no error is left out; of other metrics the first."""
    is_error = name.startswith("mismatch/") or "max" in name

    def rank(step: int) -> tuple[bool, float]:
        size = abs(points[step])
        return (not size < LARGEST, size if is_error else 0.0)

    shown = [max(part, key=rank) for _, part in groupby(points, key=lambda step: step // every)]
    return list(dict.fromkeys([*shown, *list(points)[-1:]]))


def _columns(points: Mapping[int, float], shown: Sequence[int]) -> list[list[Any]]:
    """Steps and values; a value that no axis can show is None."""
    return [list(shown), [float(f"{points[step]:.5g}") if abs(points[step]) < LARGEST else None for step in shown]]


def _intervals(run: PageRun, every: int) -> dict[str, list[list[float]]]:
    """Metric -> [step, low, high] of each evaluation: Wilson's 95% interval of a share of the held-out prompts.

    An evaluation without `eval/num_prompts` has none: older runs did not log it.
    """
    counts = run.series.get(HELD_OUT, {})
    found = {}
    for name in ("eval/pass@1", "eval/greedy"):
        points = run.series.get(name, {})
        shown = [step for step in _shown(name, points, every) if counts.get(step, 0) >= 1]
        found[name] = [[step, *wilson(points[step], counts[step])] for step in shown]
    return found


def wilson(share: float, count: float, z: float = 1.96) -> list[float]:
    """The score interval of a share of `count` (Wilson 1927); samples of one prompt count as one."""
    centre, scale = share + z * z / (2 * count), 1 + z * z / count
    half = z * math.sqrt(max(0.0, share * (1 - share)) / count + z * z / (4 * count * count))
    return [round(max(0.0, (centre - half) / scale), 5), round(min(1.0, (centre + half) / scale), 5)]


def _gaps(cell: Cell) -> dict[str, Any]:
    """The gaps of a cell as the page reads them: part, what differs, mean, max and the means of the quarters."""
    quarters = [f"q{number}_logp_abs_mean" for number in range(1, 5)]
    rows = [[gap.part, gap.name, gap.mean, gap.max, *(gap.metrics.get(name) for name in quarters)] for gap in cell.gaps]
    return {"title": f"{cell.title} tokens", "steps": cell.steps, "rows": rows}


def _newest(samples: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The newest responses, within the bounds of a page."""
    kept: list[Mapping[str, Any]] = []
    tokens = 0
    for row in reversed(samples[-MAX_SAMPLES:]):
        found = row.get("tokens")
        tokens += len(found) if isinstance(found, list) else len(str(row.get("response", "")))
        if kept and tokens > MAX_TOKENS:
            break
        kept.append(row)
    return kept[::-1]


def _meaning(name: str) -> str:
    row = describe(name)
    return f"{row.text}{f' [{row.unit}]' if row.unit else ''}" if row else ""


def _strict(value: Any) -> Any:
    """`value` with None for the floats that JSON lacks."""
    match value:
        case float():
            return value if math.isfinite(value) else None
        case dict():
            return {key: _strict(item) for key, item in value.items()}
        case list() | tuple():
            return [_strict(item) for item in value]
    return value

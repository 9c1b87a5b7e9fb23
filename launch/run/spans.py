"""Who works when: the spans that the processes of a run have written to their logs."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LINE = re.compile(r" INFO qarl\.trace: (?:(\w+)/)?(.+) from (\d+\.\d+) for (\d+\.\d+) s$", re.MULTILINE)
STEP = re.compile(r"step (\d+)")
DRIVER, ALONE = "driver", "driver alone"
ROLES = (DRIVER, "worker", "rank", "verifiers", "environments")


@dataclass(frozen=True)
class Span:
    """What one process, or a group of them, did; `start` in seconds since 1970."""

    actor: str
    name: str
    start: float
    seconds: float

    @property
    def end(self) -> float:
        return self.start + self.seconds


def read_spans(run_dir: Path) -> list[Span]:
    """Every span in the logs of a run, by process and start; those of earlier starts of the run, too."""
    found = []
    for log in (run_dir / "logs").glob("*.log"):
        for row, name, start, seconds in LINE.findall(log.read_text(encoding="utf-8", errors="replace")):
            found.append(Span(row or log.stem.replace("-", " "), name, float(start), float(seconds)))
    return sorted(found, key=lambda span: (*_place(span.actor), span.start, -span.seconds))


def _place(actor: str) -> tuple[int, int]:
    """Where the row of an actor lies: by role, then by number."""
    role, _, number = actor.partition(" ")
    return ROLES.index(role) if role in ROLES else len(ROLES), int(number or 0)


def chrome_trace(spans: Sequence[Span]) -> dict[str, Any]:
    """The spans in the format of chrome://tracing and ui.perfetto.dev; times in microseconds since the first one."""
    actors, zero = list(dict.fromkeys(span.actor for span in spans)), min((span.start for span in spans), default=0.0)
    events: list[dict[str, Any]] = []
    for row, actor in enumerate(actors):
        events.append({"ph": "M", "name": "thread_name", "pid": 0, "tid": row, "args": {"name": actor}})
        events.append({"ph": "M", "name": "thread_sort_index", "pid": 0, "tid": row, "args": {"sort_index": row}})
    for span in spans:
        times = {"ts": round((span.start - zero) * 1e6), "dur": round(span.seconds * 1e6)}
        events.append({"ph": "X", "name": span.name, "pid": 0, "tid": actors.index(span.actor), **times})
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def newest_step(spans: Sequence[Span]) -> dict[str, Any] | None:
    """The newest step that has ended, for the report; None where there is none.

    `rows` have the phases of the step, when the driver works alone, and the other processes with the share of the step
    in which each does nothing; `spans` are (row, name, from, to), in seconds since the step began. A phase mostly waits
    for the other processes: the driver counts as working where none of them does.
    """
    steps = [span for span in spans if STEP.fullmatch(span.name)]
    if not steps:
        return None
    step = max(steps, key=lambda span: span.start)
    within = [s for s in spans if s.start < step.end and s.end > step.start and not STEP.fullmatch(s.name)]
    others = sorted((s for s in within if s.actor != DRIVER), key=lambda span: span.start)
    alone = _gaps(others, step)
    rows = {DRIVER: "phases", ALONE: f"driver alone, {_share(alone, step):.0%}"}
    for actor in dict.fromkeys(span.actor for span in within if span.actor != DRIVER):
        gaps = _gaps([span for span in others if span.actor == actor], step)
        rows[actor] = f"{actor}, idle {_share(gaps, step):.0%}"
    places = {actor: row for row, actor in enumerate(rows)}
    drawn = [(s.actor, s.name, max(step.start, s.start), min(s.end, step.end)) for s in within]
    drawn += [(ALONE, "works", begin, end) for begin, end in alone]
    return {
        "step": int(step.name.split()[1]),
        "seconds": step.seconds,
        "rows": list(rows.values()),
        "spans": [[places[actor], name, begin - step.start, end - step.start] for actor, name, begin, end in drawn],
    }


def _gaps(spans: Sequence[Span], step: Span) -> list[tuple[float, float]]:
    """The parts of `step`, as begin and end, in which none of `spans`, in the order of their starts, goes on."""
    gaps, until = [], step.start
    for span in spans:
        if span.start > until:
            gaps.append((until, span.start))
        until = max(until, span.end)
    if until < step.end:
        gaps.append((until, step.end))
    return gaps


def _share(parts: Sequence[tuple[float, float]], step: Span) -> float:
    return sum(end - begin for begin, end in parts) / step.seconds

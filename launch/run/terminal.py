"""What `qarl train` shows: a live view in a terminal, plain lines elsewhere."""

import logging
import os
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import timedelta
from itertools import starmap
from typing import Literal

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Column, Table
from rich.text import Text

from launch.run.metric_table import overall_figures
from qarl.types import Activity

Verbosity = Literal["quiet", "normal", "verbose"]
LOSS = "actor/loss"
FIRST_RATIO = "actor/seq_ratio_max_dev_first_minibatch"
"""When a step takes the sampler's log-probs for pi_prox, 0 shows that the learner computes the same."""
AGE = "staleness/age_mean"
"""A step that logs it has the learner's log-probs for pi_prox: its `FIRST_RATIO` says nothing of the samplers."""
SPEED = "perf/tokens_per_s"
"""Every step logs it."""
WIDE = 400
"""Columns where there is no terminal."""
BARS = "▁▂▃▄▅▆▇█"
SHOWN = 32
"""Values of a sparkline: the newest."""
CURVES = {
    "reward/mean": "reward",
    "eval/pass@1": "accuracy",
    "mismatch/logp_abs_max": "|d log p| max",
    SPEED: "tokens/s",
}
LONG = {
    "start": "starting rollout workers and learner",
    "evaluate": "evaluating on the held-out prompts",
    "controls": "evaluating the controls",
    "export": "exporting the model",
}
"""What a line says when such a phase begins and no live view shows it: it may take minutes with a large model."""


def console() -> Console:
    """Prints tables as wide as the terminal, or as COLUMNS says. Elsewhere, such as in a pipe, it wraps no name."""
    made = Console()
    return made if made.is_terminal or "COLUMNS" in os.environ else Console(width=WIDE)


class Terminal:
    """Lines and the live view of a run. The live view begins with the first phase, or step, and ends with `close`.

    `quiet` shows warnings only; `verbose` shows the log of all libraries, too, and no live view.
    """

    def __init__(self, name: str, total: int, start_step: int, verbosity: Verbosity, live: bool) -> None:
        self._total, self._step, self._verbosity = total, start_step, verbosity
        self._name, self._began = name, time.monotonic()
        self._console = Console()
        self._first: tuple[int, float] | None = None
        self._remaining = "-"  # time, as the last step tells it
        self._phase, self._since = "start", self._began
        self._values = defaultdict[str, deque[float]](lambda: deque(maxlen=SHOWN))
        self._warnings = deque[str](maxlen=3)
        self._watched = dict[str, Callable[[], Sequence[Activity]]]()
        self._live: Live | None = None
        if live and verbosity == "normal" and self._console.is_interactive:
            self._live = Live(self, console=self._console, refresh_per_second=4, transient=True)
        self._handler: logging.Handler | None = None
        if verbosity == "verbose":
            self._handler = logging.StreamHandler()
            self._handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
            self._handler.addFilter(lambda record: record.name != "launch.run.tracking")  # shown as lines
            logging.getLogger().addHandler(self._handler)

    def note(self, line: str, level: int = logging.INFO) -> None:
        """Show one line, above the live view where there is one."""
        if level >= logging.WARNING:
            self._warnings.append(line)
        if level >= logging.WARNING or self._verbosity != "quiet":
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def watch(self, letter: str, doing: Callable[[], Sequence[Activity]]) -> None:
        """Have the live view show what `doing` returns of all actors of a kind. Its own thread calls that."""
        self._watched[letter] = doing

    def phase(self, name: str) -> None:
        """The run begins another phase."""
        self._phase, self._since = name, time.monotonic()
        if self._live is None:
            if name in LONG:
                self.note(LONG[name])
        elif not self._live.is_started:
            self._live.start()

    def show(self, step: int, values: Mapping[str, float]) -> None:
        """Show the metrics of a step, or of an evaluation."""
        self._step = max(step, self._step)
        for name in values.keys() & CURVES.keys():
            self._values[name].append(values[name])
        if held_out := _held_out(values):
            self.note(f"step {step}/{self._total}  held-out  {held_out}")
        if SPEED in values:
            self._remaining = self._eta(step)
            line = f"step {step}/{self._total}  {_describe(values)}  ETA {self._remaining}"
            if self._verbosity == "verbose":
                spent = {name.partition("/")[2]: v for name, v in values.items() if name.startswith("timing_s/")}
                line += "  " + " ".join(f"{name} {seconds:.2f}s" for name, seconds in spent.items())
            if self._live is None:
                self.note(line)
            elif not self._live.is_started:
                self._live.start()

    def close(self) -> None:
        """Restore the terminal. A second call does nothing."""
        if self._live:
            self._live.stop()
        if self._handler:
            logging.getLogger().removeHandler(self._handler)

    def __rich__(self) -> RenderableType:
        """The live view of this moment."""
        now = time.monotonic()
        head = Table.grid(Column(), Column(max_width=28), Column(no_wrap=True), padding=(0, 2))
        bar = ProgressBar(total=self._total, completed=self._step)  # it takes the width that is left
        spent = timedelta(seconds=round(now - self._began))
        times = f"step {self._step}/{self._total}  {spent} spent  ETA {self._remaining}"
        head.add_row(_cut(self._name), bar, times)
        curves = Table.grid(padding=(0, 2))
        for name, label in CURVES.items():
            if values := self._values[name]:
                curves.add_row(label, Text(sparkline(values), style="cyan"), _short(values[-1]))
        phase = f"{self._phase.replace('_', ' ')} {now - self._since:.0f} s"
        state = _State(phase, {letter: doing() for letter, doing in self._watched.items()})
        warnings = [_cut(f"! {line}", "yellow") for line in self._warnings]
        return Group(head, *[curves] * bool(curves.rows), state, *warnings)

    def _eta(self, step: int) -> str:
        """Time left at the mean pace since this process's first step, as h:mm:ss."""
        now = time.monotonic()
        if self._first is None or step <= self._first[0]:
            self._first = self._first or (step, now)
            return "-"
        first_step, first_time = self._first
        seconds = (now - first_time) / (step - first_step) * (self._total - step)
        return str(timedelta(seconds=round(seconds)))


class _State:
    """One line: what the run does, and each actor. Where it has no room, actors that do the same are told together."""

    def __init__(self, phase: str, actors: Mapping[str, Sequence[Activity]]) -> None:
        self._phase, self._actors = phase, actors

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        each = [
            (f"{letter}{number}", one) for letter, of_kind in self._actors.items() for number, one in enumerate(of_kind)
        ]
        together = [
            (_names(letter, [number for number, one in enumerate(of_kind) if one.word == word]), _sum(of_kind, word))
            for letter, of_kind in self._actors.items()
            for word in dict.fromkeys(one.word for one in of_kind)
        ]
        lines = ["  ".join([self._phase, *starmap(_said, form)]) for form in (each, together)]
        yield _cut(next((line for line in lines if len(line) <= options.max_width), lines[-1]), "dim")


def _said(who: str, what: Activity) -> str:
    return f"{who} {what.word}{f' {what.done}/{what.of}' if what.of else ''}"


def _sum(activities: Iterable[Activity], word: str) -> Activity:
    found = [one for one in activities if one.word == word]
    return Activity(word, sum(one.done for one in found), sum(one.of for one in found))


def _names(letter: str, numbers: Sequence[int]) -> str:
    """For example "w0-2,5"."""
    runs = list[list[int]]()
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return letter + ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


def _cut(text: str, style: str = "") -> Text:
    """One line, cut where it has no room: the view keeps its height."""
    return Text(text, style, overflow="ellipsis", no_wrap=True)


def sparkline(values: Iterable[float]) -> str:
    """A bar for each value, from the smallest to the largest; a space for one that is not finite."""
    shown = list(values)
    finite = [value for value in shown if abs(value) < float("inf")]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(BARS[round((v - low) * scale)] if abs(v) < float("inf") else " " for v in shown)


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _held_out(values: Mapping[str, float]) -> str:
    overall = {name.removeprefix("eval/"): values[name] for name in overall_figures(values)}
    if overall.get("mean_reward") == overall.get("pass@1"):  # no reward is a part
        overall.pop("mean_reward", None)
    return "  ".join(f"{name} {value:.3f}" for name, value in overall.items())


def _describe(values: Mapping[str, float]) -> str:
    names = {"reward/mean": "reward", "reward/accuracy": "accuracy"} if "reward/mean" in values else {LOSS: "loss"}
    parts = [f"{label} {values[name]:.3f}" for name, label in names.items() if name in values]
    if "mismatch/logp_abs_max" in values:
        parts.append(f"|d log p| max {values['mismatch/logp_abs_max']:.2g}")
    elif AGE in values:
        parts.append(f"samples {values[AGE]:.1f} versions old")
    elif values.get(FIRST_RATIO) == 0:
        parts.append("|d log p| max 0 of the first minibatch")
    parts.append(f"{values[SPEED]:,.0f} tokens/s")
    return "  ".join(parts)

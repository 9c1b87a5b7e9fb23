"""What `qarl train` shows: a live view in a terminal, plain lines elsewhere."""

import logging
import time
from collections import defaultdict, deque
from collections.abc import Iterable, Mapping
from datetime import timedelta
from typing import Literal

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Column, Table
from rich.text import Text

from launch.run.metric_table import overall_figures

Verbosity = Literal["quiet", "normal", "verbose"]
LOSS = "actor/loss"
FIRST_RATIO = "actor/seq_ratio_max_dev_first_minibatch"
"""When a step takes the sampler's log-probs for pi_prox, 0 shows that the learner computes the same."""
AGE = "staleness/age_mean"
"""A step that logs it has the learner's log-probs for pi_prox: its `FIRST_RATIO` says nothing of the samplers."""
SPEED = "perf/tokens_per_s"
"""Every step logs it."""
BARS = "▁▂▃▄▅▆▇█"
SHOWN = 32
"""Values of a sparkline: the newest."""
CURVES = {
    "reward/mean": "reward",
    "eval/pass@1": "accuracy",
    "mismatch/logp_abs_max": "|d log p| max",
    SPEED: "tokens/s",
}
WORKERS, RANKS, VERIFIERS, DRIVER = "workers", "ranks", "verifiers", "driver"
PHASES: Mapping[str, tuple[str, ...]] = {
    "sample": (WORKERS,),
    "reward": (VERIFIERS,),
    "evaluate": (WORKERS, VERIFIERS),
    "controls": (WORKERS, RANKS, VERIFIERS),
    "sleep": (WORKERS,),
    "start": (WORKERS, RANKS),
    "publish": (WORKERS, RANKS),
    **dict.fromkeys(("prox", "unaligned", "update", "table", "checkpoint", "export"), (RANKS,)),
}
"""Who is at work in a phase of the run. In any other one the driver is, and all wait for it."""
LONG = {
    "start": "starting rollout workers and learner",
    "evaluate": "evaluating on the held-out prompts",
    "controls": "evaluating the controls",
    "export": "exporting the model",
}
"""What a line says when such a phase begins and no live view shows it: it may take minutes with a large model."""


class Terminal:
    """Lines and the live view of a run. The live view begins with the first phase, or step, and ends with `close`.

    A run that samples `ahead` keeps workers and verifiers at work in all phases: they are never said to wait.
    `quiet` shows warnings only; `verbose` shows the log of all libraries, too, and no live view.
    """

    def __init__(
        self, name: str, total: int, start_step: int, verbosity: Verbosity, live: bool, ahead: bool = False
    ) -> None:
        self._ahead = ahead
        self._total, self._step, self._verbosity = total, start_step, verbosity
        self._name, self._began = name, time.monotonic()
        self._console = Console()
        self._first: tuple[int, float] | None = None
        self._remaining = "-"  # time, as the last step tells it
        self._phase, self._since = "start", self._began
        self._values = defaultdict[str, deque[float]](lambda: deque(maxlen=SHOWN))
        self._warnings = deque[str](maxlen=3)
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
        busy = PHASES.get(self._phase, (DRIVER,))
        waiting = [who for who in (WORKERS, RANKS, VERIFIERS, DRIVER) if who not in busy]
        if self._ahead:
            waiting = [who for who in waiting if who not in (WORKERS, VERIFIERS)]
        state = f"{self._phase.replace('_', ' ')} {now - self._since:.0f} s: {', '.join(busy)}"
        state += f"   (waiting: {', '.join(waiting)})"
        warnings = [_cut(f"! {line}", "yellow") for line in self._warnings]
        return Group(head, *[curves] * bool(curves.rows), _cut(state, "dim"), *warnings)

    def _eta(self, step: int) -> str:
        """Time left at the mean pace since this process's first step, as h:mm:ss."""
        now = time.monotonic()
        if self._first is None or step <= self._first[0]:
            self._first = self._first or (step, now)
            return "-"
        first_step, first_time = self._first
        seconds = (now - first_time) / (step - first_step) * (self._total - step)
        return str(timedelta(seconds=round(seconds)))


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

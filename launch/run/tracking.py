"""Where a run's metrics go: JSONL files in the run folder, the terminal, and other trackers."""

import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self, TextIO

from launch.run.alerts import Alerts
from launch.run.files import write_whole
from launch.run.tables import Decode, with_tokens
from launch.run.tensorboard import TensorboardTracker
from launch.run.terminal import SPEED, Terminal, Verbosity
from launch.run.usage import usage
from launch.run.wandb_run import WandbTracker
from qarl.config.run import Config
from qarl.errors import INTERRUPTED, TRACEBACK, ConfigError, DataError, behind, first_line
from qarl.hooks import load_function
from qarl.metrics import Histogram, Value
from qarl.protocols import Row, Tracker
from qarl.types import Activity, AugmentOutcome

METRICS_FILE = "metrics.jsonl"
SAMPLES_FILE = "samples.jsonl"
AUGMENT_FILE = "augment.jsonl"
LAST_STEP = 10**12


class RunTracker(Tracker):
    """Shows progress in the terminal and passes everything on to others.

    A run resumed at `start_step` removes what was logged for later steps, which run again.

    With `start_step` 0, new files and a new W&B run are started. `decode` makes the text of token ids for the tables.
    As a context manager it tells the trackers of an error that ends the run, and closes them.

    Raises:
        DataError: a log to be continued is damaged.
        ResourceError: W&B cannot start the run (online mode without login or network).
    """

    def __init__(
        self,
        config: Config,
        run_dir: Path,
        start_step: int,
        total_steps: int,
        decode: Decode | None = None,
        verbosity: Verbosity = "normal",
    ) -> None:
        self._run_dir, self._decode = run_dir, decode
        self._trackers = list(_make(config, run_dir, start_step))
        self._rows_left = config.tracking.table_max_rows - _lines(run_dir / SAMPLES_FILE)
        self._alerts = Alerts(config)
        self._terminal = Terminal(config.run.name, total_steps, start_step, verbosity, config.tracking.progress)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        try:
            if error is not None:
                error = behind(error)
                reason = " ".join(str(error).split()) or type(error).__name__
                if isinstance(error, KeyboardInterrupt):
                    reason = INTERRUPTED
                for tracker in self._trackers:
                    tracker.stopped(reason)
        finally:
            self.close()

    def log(self, step: int, metrics: Mapping[str, Value]) -> None:
        """Pass the metrics on, with the memory in use where they are those of a whole step."""
        if SPEED in metrics:
            metrics = {**metrics, **usage(self._run_dir)}
        for tracker in self._trackers:
            tracker.log(step, metrics)
        values = {name: float(value) for name, value in metrics.items() if not isinstance(value, Histogram)}
        self._terminal.show(step, values)
        for title, text in self._alerts.observe(step, values):
            self.alert(title, text)

    def table(self, step: int, name: str, rows: Sequence[Row]) -> None:
        """Pass the rows on, with the text of each token, while the tables have room."""
        if len(rows) > self._rows_left > 0:
            self.note(f"step {step}: the tables have tracking.table_max_rows rows; they get no more")
        rows = [with_tokens(row, self._decode) for row in rows[: max(0, self._rows_left)]]
        self._rows_left -= len(rows)
        for tracker in self._trackers:
            tracker.table(step, name, rows)

    def phase(self, name: str) -> None:
        self._terminal.phase(name)
        for tracker in self._trackers:
            tracker.phase(name)

    def watch(self, letter: str, doing: Callable[[], Sequence[Activity]]) -> None:
        """Show what all actors of a kind do; see `Terminal.watch`."""
        self._terminal.watch(letter, doing)

    def exported(self, files: Mapping[str, Path]) -> None:
        for tracker in self._trackers:
            tracker.exported(files)

    def augmented(self, step: int, outcomes: Sequence[AugmentOutcome]) -> None:
        for tracker in self._trackers:
            tracker.augmented(step, outcomes)

    def note(self, line: str, level: int = logging.INFO) -> None:
        """Log one line at `level`: show it in the terminal, and pass it to the trackers."""
        logging.getLogger(__name__).log(level, line)
        self._terminal.note(line, level)
        for tracker in self._trackers:
            tracker.note(line)

    def alert(self, title: str, text: str) -> None:
        """Log `text` as a warning, and pass both on."""
        self.note(text, logging.WARNING)
        for tracker in self._trackers:
            tracker.alert(title, text)

    def close(self) -> None:
        """Restore the terminal and close the trackers. Call it in a `finally`; a second call does nothing."""
        self._terminal.close()
        while self._trackers:
            self._trackers.pop().close()


class JsonlTracker(Tracker):
    """Files of the run folder: metrics, samples and problems made by the policy, one object per line."""

    def __init__(self, config: Config, run_dir: Path, start_step: int) -> None:
        def opened(name: str) -> TextIO:
            return _continue_log(run_dir / name, start_step, config.train.steps)

        self._metrics_file, self._samples_file = opened(METRICS_FILE), opened(SAMPLES_FILE)
        self._augment_file = opened(AUGMENT_FILE) if config.pool.augment.per_step > 0 else None

    def log(self, step: int, metrics: Mapping[str, Value]) -> None:
        """A histogram is `{"edges": [...], "counts": [...]}` in the file."""
        values = {n: asdict(v) if isinstance(v, Histogram) else _strict(float(v)) for n, v in metrics.items()}
        _append(self._metrics_file, [{"step": step, "time": time.time(), **values}])

    def table(self, step: int, name: str, rows: Sequence[Row]) -> None:
        records = [{key: _strict(value) for key, value in row.items()} for row in rows]
        _append(self._samples_file, [{"step": step, "table": name, **record} for record in records])

    def augmented(self, step: int, outcomes: Sequence[AugmentOutcome]) -> None:
        assert self._augment_file is not None
        _append(self._augment_file, [{"step": step, **asdict(outcome)} for outcome in outcomes])

    def close(self) -> None:
        for file in (self._metrics_file, self._samples_file, self._augment_file):
            if file is not None:
                file.close()


def _make(config: Config, run_dir: Path, start_step: int) -> Iterator[Tracker]:
    """The trackers of a run. Raises ConfigError: a function cannot be loaded, or makes none."""
    logged = read_log(run_dir / METRICS_FILE) if start_step else []  # before it is cut
    for name in config.tracking.trackers:
        if name == "jsonl":
            yield JsonlTracker(config, run_dir, start_step)
        elif name == "tensorboard":
            yield TensorboardTracker(run_dir, start_step)
        elif name != "wandb":
            yield _own(name, config, run_dir)
        elif config.tracking.wandb_mode != "disabled":
            yield WandbTracker(config, run_dir, start_step, logged)


def _own(name: str, config: Config, run_dir: Path) -> Tracker:
    """The tracker that the user's function makes. Raises ConfigError: it raises, or makes something else."""
    where, make = "tracking.trackers", load_function(name, "tracking.trackers")
    try:
        made = make(config, run_dir)
    except Exception as error:  # the user's code may raise anything
        raise ConfigError(f"{name}: {type(error).__name__}: {first_line(error)}", where, TRACEBACK) from error
    lacking = [method for method in vars(Tracker) if method[0] != "_" and not callable(getattr(made, method, None))]
    if lacking:
        what = f"{name} makes a {type(made).__name__}, which lacks the method {lacking[0]}"
        raise ConfigError(what, where, "qarl.protocols.Tracker is a base that has all")
    return made


def read_log(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSONL log in the order of writing; none where there is no file.

    What follows the last line end is left out: its writer was killed, or is still writing. Numbers that JSON lacks are
    strings ("nan", "inf"), which `float` reads. Raises DataError: a whole line is not a JSON object with a step.
    """
    if not path.is_file():
        return []
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict) or type(row.get("step")) is not int or not 0 <= row["step"] <= LAST_STEP:
            hint = "delete that line, or start over with run.resume=false"
            raise DataError("not a JSON object with a step", where=f"{path}:{number}", hint=hint)
        rows.append(row)
    return rows


def number(value: Any, where: str) -> float:
    """A value of a log. Raises DataError: it is no number."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(f"not a number: {str(value)[:40]!r}", where, "delete that value") from error


def _lines(path: Path) -> int:
    """Lines of a file; none where there is no file."""
    if not path.is_file():
        return 0
    with path.open("rb") as file:
        return sum(1 for _ in file)


def _continue_log(path: Path, start_step: int, total_steps: int) -> TextIO:
    """Open the log for appending, with the rows up to `start_step` (none when it is 0) and no others.

    After the last step only the evaluation at the end is left: it is made again, and so its row is dropped.
    """
    ends = start_step if start_step >= total_steps else None
    rows = [row for row in read_log(path) if row["step"] <= start_step] if start_step else []
    rows = [row for row in rows if row["step"] != ends or not any(key.startswith("eval/") for key in row)]
    write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))
    return path.open("a", buffering=1)


def _append(file: TextIO, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows to a log, and wait until they are on the disk: a checkpoint is never ahead of the logs."""
    file.write("".join(json.dumps(row) + "\n" for row in rows))
    file.flush()
    os.fsync(file.fileno())


def _strict(value: Any) -> Any:
    """`value`, with the floats that JSON lacks (NaN and the infinities) as strings."""
    if isinstance(value, list):
        return [_strict(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value

"""Spans in logs, as a Chrome trace and as one step of the report."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from launch.cli import main
from launch.run.spans import Span, chrome_trace, newest_step, read_spans
from qarl.logs import FORMAT, driver_log
from qarl.trace import span

SPANS = [
    Span("driver", "step 2", 90.0, 5.0),
    Span("driver", "step 3", 100.0, 4.0),
    Span("driver", "sample", 100.0, 3.0),
    Span("worker 0", "sample", 99.0, 2.0),
    Span("worker 0", "load", 100.5, 1.5),  # from 100 to 102 it works
    Span("rank 0", "update", 103.0, 9.0),
]


def write_logs(run: Path) -> None:
    """The lines of SPANS, as processes would write them, in the reverse order; and other lines."""
    (run / "logs").mkdir(parents=True)
    for one in reversed(SPANS):
        record = logging.makeLogRecord({"name": "qarl.trace", "levelname": "INFO"})
        record.msg = f"{one.name} from {one.start:.6f} for {one.seconds:.6f} s"
        with (run / "logs" / f"{one.actor.replace(' ', '-')}.log").open("a") as file:
            file.write(f"{logging.Formatter(FORMAT).format(record)}\nvllm: from 1.0 for 2.0 s\n")


def test_processes_log_what_they_do(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "driver.log"
    with driver_log(log), pytest.raises(ZeroDivisionError), span("sample"), span("verifiers/score"):
        raise ZeroDivisionError
    outer, inner = read_spans(tmp_path)
    assert (outer.actor, outer.name, inner.actor, inner.name) == ("driver", "sample", "verifiers", "score")
    assert outer.start <= inner.start
    assert outer.end >= inner.end - 1e-5


def test_a_trace_has_a_row_for_each_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_logs(tmp_path)
    assert read_spans(tmp_path) == SPANS
    assert main(["trace", str(tmp_path)]) == 0
    file = tmp_path / "trace.json"
    assert capsys.readouterr().out == f"{file}\n"
    trace = json.loads(file.read_text())
    assert trace == chrome_trace(SPANS)
    names = [event["args"]["name"] for event in trace["traceEvents"] if event["name"] == "thread_name"]
    assert names == ["driver", "worker 0", "rank 0"]
    assert trace["traceEvents"][-1] == {
        **{"ph": "X", "name": "update", "pid": 0, "tid": 2},
        **{"ts": 13_000_000, "dur": 9_000_000},
    }


def test_a_folder_without_logs_has_no_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trace", str(tmp_path)]) == 2
    assert "is no folder of a run" in capsys.readouterr().err
    (tmp_path / "config.yaml").touch()
    assert main(["trace", str(tmp_path)]) == 2
    assert "no process has logged" in capsys.readouterr().err


def test_the_report_shows_the_newest_step() -> None:
    assert newest_step(SPANS) == {
        "step": 3,
        "seconds": 4.0,
        "rows": ["phases", "driver alone, 25%", "worker 0, idle 50%", "rank 0, idle 75%"],
        "spans": [
            [0, "sample", 0.0, 3.0],
            [2, "sample", 0.0, 1.0],
            [2, "load", 0.5, 2.0],
            [3, "update", 3.0, 4.0],
            [1, "works", 2.0, 3.0],
        ],
    }
    assert newest_step(SPANS[2:]) is None

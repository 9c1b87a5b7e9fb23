"""`qarl simulate` from the command line."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from launch.cli import main

Run = Callable[..., dict[str, Any]]


@pytest.fixture
def simulate(run: Run) -> Run:
    """Runs `qarl simulate ... --json`; gives its JSON."""
    return partial(run, "simulate")


def test_modes_side_by_side(simulate: Run) -> None:
    found = simulate(
        "quickstart", "cluster.device=cpu", "rollout.num_workers=2", "--staleness", "0", "1", "--steps", "5"
    )
    in_turn, ahead = found["outcomes"]
    assert (in_turn["max_staleness"], ahead["max_staleness"]) == (0, 1)
    assert in_turn["ages"] == {"0": 1.0}
    assert ahead["ages"] == {"1": 1.0}
    assert ahead["step_s"] < in_turn["step_s"]
    assert found["splits"] == []


def test_the_best_split_is_where_neither_side_waits_for_long(simulate: Run) -> None:
    config = ["quickstart", "cluster.device=cpu", "train.max_staleness=1", "learner.num_threads=1"]
    found = simulate(*config, "--devices", "6", "--steps", "2")
    (splits,) = found["splits"]
    assert found["outcomes"] == splits[:1]
    assert {(row["workers"], row["ranks"]) for row in splits} == {(n, 6 - n) for n in range(1, 6)}
    best, worst = splits[0], splits[-1]
    assert best["responses_per_s"] > 1.3 * worst["responses_per_s"]
    by_workers = sorted(splits, key=lambda row: row["workers"])
    assert by_workers[0]["workers_idle"] < by_workers[-1]["workers_idle"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--devices", "1"], "--devices: a worker and a rank need a device each"),
        (["--from", "no/such/run"], "no/such/run: is no folder of a run"),
        (["rollout.partial=true", "--staleness", "0"], "set train.max_staleness to 1 or more"),
        (["environment.kind=guess", "--staleness", "1"], "environment.kind"),
        (["cluster.device=cpu", "rollout.transport=nccl"], "rollout.transport"),
        (["cluster.device=cpu", "rollout.scheme=none", "rollout.tensor_parallel_size=2"], "is not simulated"),
    ],
)
def test_wrong_input_is_one_line(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "quickstart", *argv]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_tables_fit_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["simulate", "quickstart", "cluster.device=cpu", "--staleness", "4", "--steps", "3"]) == 0
    out = capsys.readouterr().out
    assert "steps/h" in out
    assert "…" not in out
    assert "ages 1: 33%, 2: 33%, 3: 33%" in " ".join(out.split())

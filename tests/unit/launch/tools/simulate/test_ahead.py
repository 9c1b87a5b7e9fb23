"""What `qarl plan` says of a run that samples ahead."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launch.cli import main
from launch.preflight import model_config
from launch.tools.plan.devices import device_called
from launch.tools.plan.planner import Planner
from launch.tools.plan.result import Slowdown
from launch.tools.simulate.ahead import simulate_ahead
from qarl.config.io import load_config
from qarl.numerics import processor

ROOT = Path(__file__).parents[5]
AHEAD = ("quickstart", "cluster.device=cpu", "rollout.num_workers=2", "train.max_staleness=4")
APART = ("cluster.address=auto", "learner.num_threads=1", "learner.num_ranks=3")
Run = Callable[..., dict[str, Any]]


@pytest.mark.parametrize(
    ("plans", "simulates"),
    [
        (["--response-tokens", "5"], ["--response-tokens", "5"]),
        ([], ["--response-tokens", "14", "--spread", "0"]),
    ],
)
def test_a_plan_shows_the_step_that_simulate_shows(run: Run, plans: list[str], simulates: list[str]) -> None:
    plan = run("plan", *AHEAD, *plans)
    found = plan["simulated"]
    assert [found["outcome"]] == run("simulate", *AHEAD, *simulates)["outcomes"]
    assert (found["best_split"], found["refused"]) == (None, "")
    assert found["outcome"]["age"] > 1
    assert found["outcome"]["step_s"] != pytest.approx(plan["estimates"][0]["times"]["step_s"], rel=0.02)


def test_a_plan_shows_the_split_that_simulate_finds(run: Run) -> None:
    found = run("plan", *AHEAD, *APART, "--response-tokens", "5")["simulated"]
    simulated = run("simulate", *AHEAD, *APART, "--response-tokens", "5", "--devices", "5")
    assert [found["best_split"]] == simulated["outcomes"]
    assert found["outcome"] in simulated["splits"][0]
    assert found["outcome"] != found["best_split"]


def test_a_plan_in_turn_simulates_nothing(run: Run) -> None:
    assert run("plan", *AHEAD, "train.max_staleness=0")["simulated"] is None


def test_a_plan_with_faults_simulates_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *AHEAD, "rollout.batch_invariant=true", "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["simulated"] is None


def test_a_plan_says_why_it_does_not_simulate(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    schedule = 'rollout.schedule=[{"from_step": 10, "scheme": "fp8_channel"}]'
    found = run("plan", *AHEAD, schedule)["simulated"]
    assert found == {
        "outcome": None,
        "best_split": None,
        "refused": "rollout.schedule: is not simulated; leave it at its default",
    }
    assert main(["plan", *AHEAD, schedule]) == 0
    assert "is not simulated: rollout.schedule: is not simulated" in " ".join(capsys.readouterr().out.split())


def test_measured_speeds_are_simulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "has_avx512", lambda: True)
    device = device_called("cpu")
    config = load_config(ROOT / "configs" / "quickstart.yaml", list(AHEAD[1:]))
    plan = Planner(config, model_config(config), device).plan()
    slow = replace(plan, slowdown=Slowdown(rollout=3.0, learner=2.0))
    found, slower = (simulate_ahead(config, one, device, has_lengths=False).outcome for one in (plan, slow))
    assert found
    assert slower
    assert slower.step_s > 1.8 * found.step_s


@pytest.mark.parametrize(("apart", "last"), [((), "share their device"), (APART, "The best split of the 5 devices")])
def test_text_for_the_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], apart: tuple[str, ...], last: str
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["plan", *AHEAD, *apart]) == 0
    text = capsys.readouterr().out
    for words in ("Simulated steps, which sample ahead", "steps/h", "idle", "age", last):
        assert words in text
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text

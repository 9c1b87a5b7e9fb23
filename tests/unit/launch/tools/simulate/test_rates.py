"""Speeds and lengths that a run has shown."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from statistics import fmean, pstdev

import pytest

from launch.tools.plan.result import Speeds
from launch.tools.simulate.rates import Measured, calibrated, lognormal, rates_of
from launch.tools.simulate.simulate import run
from qarl.errors import ConfigError, DataError
from tests.support.simulation import RESPONSES, config, rates


def test_lengths_have_the_mean_and_the_spread() -> None:
    found = lognormal(1000, 0.5, 10**6)
    assert fmean(found) == pytest.approx(1000, rel=0.01)
    assert pstdev(map(math.log, found)) == pytest.approx(0.5, rel=0.01)
    assert max(lognormal(1000, 0.5, 1500)) == 1500
    assert set(lognormal(10, 0.0, 99)) == {10}


def test_rates_depend_on_the_network_and_the_counts() -> None:
    speeds = Speeds(
        slots=8,
        decode_s=lambda batch: 0.5 * batch,
        prefill_s=1.0,
        score_s=0.1,
        update_s=0.2,
        optimizer_s=3.0,
        publish_s=5.0,
        published_bytes=1000,
        gradient_bytes=4000,
    )
    long = config(workers=5, ranks=4, rollout={"num_workers": 5, "sampling": {"max_new_tokens": 1000}})
    found = rates_of(speeds, long, [1, 100, 1000], 100.0, 1.0)
    assert (found.token, found.lengths) == (2, [1, 50, 500])
    assert (found.decode_s(4), found.score_s, found.update_s) == (4.0, 0.2, 0.4)
    assert found.publish_s == 5.0 + 3 * 10.0  # two engines, four, five
    assert found.exchange_s == 2 * 3 / 4 * 40.0
    alone = rates_of(speeds, config(), [1], math.inf, 1.0)
    assert (alone.publish_s, alone.exchange_s, alone.token) == (5.0, 0.0, 1)


def write_run(folder: Path, steps: int, rows: int = 0) -> None:
    metrics = [
        {
            "step": step,
            "timing_s/step": 10.0 if step > 1 else 99.0,
            "timing_s/sample": 4.0,
            **({"timing_s/prox": 1.5} if step < 4 else {}),
            "timing_s/update": 3.0,
            "timing_s/publish": 1.0,
            "reward/mean": 0.5,
            "reward/informative_groups": 0.75,
            "response_length/mean": 20.0,
            "response_length/max": 60.0,
        }
        for step in range(1, steps + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    table = [{"step": 1, "token_ids": [0] * (1 + n % 7)} for n in range(rows)]
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table))


def test_a_run_shows_its_stages_and_lengths(tmp_path: Path) -> None:
    write_run(tmp_path, 8, rows=140)
    found = Measured.of(tmp_path, config())
    assert found.stages == {"sample": 4.0, "prox": 1.5, "update": 3.0, "publish": 1.0}
    assert (found.rest, found.informative) == (2.0, 0.75)
    assert sorted(found.lengths) == sorted([*range(1, 8)] * 20)

    write_run(tmp_path, 8, rows=20)  # too few: a distribution of the steps' mean and longest
    lengths = Measured.of(tmp_path, config()).lengths
    assert fmean(lengths) == pytest.approx(20, rel=0.05)
    assert sorted(lengths)[int(len(lengths) * (1 - 1 / RESPONSES))] == pytest.approx(60, rel=0.05)


def test_a_run_that_shows_too_little_is_refused(tmp_path: Path) -> None:
    write_run(tmp_path, 3)
    with pytest.raises(DataError, match="has 2 whole steps after the first, 3 are needed"):
        Measured.of(tmp_path, config())
    with pytest.raises(ConfigError, match="sampled while it learned"):
        Measured.of(tmp_path, config(max_staleness=1))


def test_the_unaligned_forward_is_calibrated_apart() -> None:
    guess = rates(score_s=1.0, unaligned_s=1.0, update_s=1.0)
    stages = {"sample": 1.0, "prox": 2.0, "unaligned": 5.0, "update": 3.0, "publish": 1.0}
    simulated = dict.fromkeys(stages, 1.0)
    found = calibrated(guess, guess, Measured(stages, 0.0, [1], 1.0), simulated, RESPONSES)
    assert (found.score_s, found.unaligned_s, found.update_s) == (2.0, 5.0, 3.0)
    del simulated["unaligned"]
    found = calibrated(guess, guess, Measured(stages, 0.0, [1], 1.0), simulated, RESPONSES)
    assert found.unaligned_s == 2.0


def test_a_calibrated_simulation_takes_what_was_measured(tmp_path: Path) -> None:
    write_run(tmp_path, 8)
    measured = replace(Measured.of(tmp_path, config()), rest=0.0)
    guess = rates(
        decode_s=lambda batch: 0.1 + 0.01 * batch, prefill_s=0.05, score_s=1e-3, update_s=5e-3, optimizer_s=0.1
    )
    guess = replace(guess, lengths=measured.lengths)
    first = run(config(), guess, steps=7)
    again = run(config(), calibrated(guess, guess, measured, first.stages, RESPONSES), steps=7)
    for name in ("sample", "prox", "update", "publish"):
        assert again.stages[name] == pytest.approx(measured.stages[name], rel=0.05)
    proved = fmean([1.5, 1.5, 0, 0, 0, 0, 0])  # steps 2 to 8: two more to prove
    assert again.step_s == pytest.approx(4 + 3 + 1 + proved, rel=0.05)
    slower = calibrated(guess, guess, replace(measured, rest=2.0), first.stages, RESPONSES)
    assert slower.driver_s == 2.0 / RESPONSES

"""Collecting the groups of a step, in runs among fakes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from qarl.errors import PublicationError, RolloutError
from qarl.prompts.pool import Pool
from qarl.tasks.sorting import is_heldout, solve
from qarl.types import Sample, SampleRequest, Score
from qarl.weights.source import PublishedWeights
from tests.support.fakes import FakeEngine, FakeRewards, make_weights
from tests.support.records import row_of
from tests.support.runs import (
    AUGMENT,
    DIGITS,
    GROUP,
    HELDOUT_DIGITS,
    PROMPTS,
    Run,
    advantages_of,
    make_config,
    right_half,
)
from tests.support.timing import TimedFleet, Told
from trainer.collect import Collector, Group, collection_metrics
from trainer.timer import Timer


def test_a_group_has_one_score_a_response() -> None:
    sample = FakeEngine().generate([SampleRequest(PROMPTS[3], 0, 1.0, 4)])[0]
    with pytest.raises(RolloutError, match=r"1 scores for 2 responses to prompts \{'p3'\}"):
        Group([sample, sample], [Score(1.0)])


def test_dynamic_sampling_replaces_uninformative_groups(tmp_path: Path) -> None:
    config = make_config(train={"steps": 2, "dynamic_sampling": 9}, pool={"cooldown_steps": 0})
    run = Run(tmp_path, config, rewards=FakeRewards(right_half))
    run.trainer.run()
    learned = [[s.prompt_ids for m in update for s in m] for update in run.learner.minibatches]
    assert [len(ids) for ids in learned] == [4 * GROUP] * 2
    assert run.values("actor/groups_used") == [4.0] * 2
    sampled = run.values("train/groups_sampled")
    assert all(count > 4 for count in sampled)
    assert run.trainer.progress.rollouts == GROUP * sum(sampled)
    # The pool has heard of every group, the dropped ones too, and none was drawn twice in a step.
    assert sum(record.visits for record in run.pool._records.values()) == sum(sampled)
    training = [r for requests in run.fleet.requests for r in requests if r.prompt in PROMPTS]
    assert len({request.seed for request in training}) == len(training)


def test_refills_are_bounded_by_draws_and_by_the_pool(tmp_path: Path) -> None:
    rewards = FakeRewards(lambda _: 1.0)
    few = Run(tmp_path / "few", make_config(train={"steps": 1, "dynamic_sampling": 2}), rewards=rewards)
    few.trainer.run()
    assert few.values("train/groups_sampled") == [12.0]
    many = Run(tmp_path / "many", make_config(train={"steps": 1, "dynamic_sampling": 99}), rewards=rewards)
    many.trainer.run()
    assert many.values("train/groups_sampled") == [len(PROMPTS)]
    for run in few, many:
        assert run.values("actor/groups_used") == [0.0]
        assert run.learner.minibatches == []
        assert run.values("pool/in_flight") == [0.0]


def test_allocation_keeps_the_budget_and_gives_uncertain_prompts_more(tmp_path: Path) -> None:
    config = make_config(
        train={"steps": 8, "allocation": "frontier", "prompts_per_step": 6},
        pool={"cooldown_steps": 0, "strategy": "uniform"},
    )
    run = Run(tmp_path, config, rewards=FakeRewards(right_half))
    run.trainer.run()
    training = [r for r in run.fleet.requests if r and r[0].prompt in PROMPTS]
    sizes = [Counter(int(request.prompt.id[1:]) for request in requests) for requests in training]
    assert [sum(counts.values()) for counts in sizes] == [6 * GROUP] * 8
    assert all(2 <= size <= 2 * GROUP for counts in sizes for size in counts.values())
    assert {size for counts in sizes[:4] for size in counts.values()} == {GROUP}  # nothing is known yet
    for counts in sizes[4:]:
        odd, even = ([size for number, size in counts.items() if number % 2 == rest] for rest in (1, 0))
        assert not odd or not even or min(odd) > max(even)
    assert max(run.values("train/group_size_max")) > GROUP > min(run.values("train/group_size_min"))
    # Groups of other sizes have advantages of their own: each sums to zero, and stays whole in one minibatch.
    for update in run.learner.minibatches:
        for minibatch in update:
            assert sum(sequence.advantage for sequence in minibatch) == pytest.approx(0, abs=1e-4)


def test_new_problems_are_sampled_with_the_rollouts_and_trained_on(tmp_path: Path) -> None:
    run = Run(tmp_path, make_config(train={"steps": 8}, pool={"augment": AUGMENT, "cooldown_steps": 0}))
    run.trainer.run()
    known = {prompt.id for prompt in [*DIGITS, *HELDOUT_DIGITS]}
    grown = {outcome.text for _, outcome in run.tracker.outcomes if not outcome.reason}
    assert grown
    assert all(not is_heldout(solve(digits)) for digits in grown)
    requests = [request for calls in run.fleet.requests for request in calls]
    drawn = {request.prompt.id for request in requests} - known
    assert {f"sorting/{digits}" for digits in grown} & drawn  # children are drawn, and rolled out
    # The parents' requests came with a step's rollouts, whose groups stay whole.
    mixed = [calls for calls in run.fleet.requests if any(r.prompt.id.startswith("augment/") for r in calls)]
    assert all(len([r for r in calls if not r.prompt.id.startswith("augment/")]) == 4 * GROUP for calls in mixed)
    assert run.trainer.progress.rollouts == 8 * 4 * GROUP
    assert run.values("augment/accepted")[-1] == len(grown)
    assert run.steps("timing_s/augment") == list(range(1, 9))


class Shaped(FakeRewards):
    """Every response is right, and its reward is minus its length."""

    def score(self, samples: Sequence[Sample]) -> list[Score]:
        lengths = [float(len(sample.response_ids)) for sample in samples]
        names = ("right", "short")
        return [Score(-n, success=1.0, components=dict(zip(names, (1.0, -n), strict=True))) for n in lengths]


def test_any_float_trains_and_the_success_goes_to_the_pool(tmp_path: Path) -> None:
    run = Run(tmp_path, make_config(train={"steps": 1}), rewards=Shaped())
    run.trainer.run()
    assert any(advantage != 0 for advantage in advantages_of(run))
    seen = [record for record in run.pool._records.values() if record.visits]
    assert all(record.successes == record.trials > 0 for record in seen)
    assert run.values("reward/accuracy") == run.values("reward/right/mean") == [1.0]
    assert run.values("reward/mean") == run.values("reward/short/mean")
    assert run.values("reward/mean")[0] < -1.0
    assert run.values("reward/right/std") == [0.0]


def test_a_component_is_averaged_over_the_responses_that_it_judges() -> None:
    samples = FakeEngine().generate([SampleRequest(PROMPTS[0], seed, 1.0, 4) for seed in range(3)])
    scores = [Score(1.0, components={"a": a, "b": b}) for a, b in ((1.0, math.nan), (0.0, math.nan), (math.nan, -2.0))]
    metrics = collection_metrics([Group(samples, scores)], make_config())
    assert (metrics["reward/a/mean"], metrics["reward/a/std"]) == (0.5, 0.5)
    assert (metrics["reward/b/mean"], metrics["reward/b/std"]) == (-2.0, 0.0)
    row = row_of(samples[0], scores[0])
    assert row["reward/a"] == 1.0
    assert math.isnan(float(row["reward/b"]))


class OneBehind(FakeEngine):
    """Says that it has version v-1 after it was given v."""

    def load(self, weights: PublishedWeights) -> None:
        super().load(replace(weights, manifest=replace(weights.manifest, version=max(0, weights.manifest.version - 1))))


def test_samples_of_old_weights_stop_the_run(tmp_path: Path) -> None:
    run = Run(tmp_path, make_config(), engines=[FakeEngine(0), OneBehind(1)])
    with pytest.raises(PublicationError, match=r"samples of weight versions \[0\] at version 1"):
        run.trainer.run()
    assert run.steps("timing_s/step") == [1]


def timed(fleet: TimedFleet, clock: Told, max_staleness: int = 0, **stragglers: float) -> Collector:
    """A collector of steps of four groups, with `kind: return`."""
    rollout = {"stragglers": {"kind": "return", **stragglers}}
    config = make_config(train={"steps": 2, "max_staleness": max_staleness}, rollout=rollout)
    fleet.load(make_weights(0))
    return Collector(config, fleet, FakeRewards(), Pool(PROMPTS, config.pool, seed=1), None, clock)


def test_a_step_whose_groups_all_are_stragglers_says_so(tmp_path: Path) -> None:
    clock = Told()
    fleet = TimedFleet(clock, [9.0] * 4 + [1.0] * 4)
    stragglers = {"kind": "return", "after_s": 5.0}
    config = make_config(train={"steps": 2}, eval={"every": 9}, rollout={"stragglers": stragglers})
    run = Run(tmp_path, config, fleet=fleet, clock=clock)
    run.trainer.run()
    said = [note for note in run.tracker.notes if "trains nothing" in note]
    assert said == ["step 1 trains nothing: all groups went back to the pool, 4 as stragglers, 0 as too old"]
    assert run.values("train/stragglers") == [4.0, 0.0]


@pytest.mark.parametrize(
    ("seconds", "late", "until"),
    [
        ([1.0, 2.0, 2.0, 50.0], [3], 6.1),  # three times the median of 1, 2, 2 and one that is not finished
        ([1.0, 2.0, 2.0, 5.9], [], 5.9),
        ([1.0, 2.0, 50.0, 50.0], [], 50.0),  # no more than half of them ever finish before the others
    ],
)
def test_a_straggler_takes_longer_than_some_medians(seconds: list[float], late: list[int], until: float) -> None:
    clock = Told()
    fleet = TimedFleet(clock, seconds)
    collector = timed(fleet, clock, times_median=3.0)
    groups, _ = collector.collect(1, Timer())
    assert len(groups) == 4 - len(late)
    assert fleet.aborted == late
    assert collector.metrics()["train/stragglers"] == len(late)
    assert clock.moment == pytest.approx(until, abs=0.11)  # the collector looks ten times a second


def test_what_finishes_while_nobody_looks_is_no_straggler() -> None:
    clock = Told()
    fleet = TimedFleet(clock, [1.0] * 4 + [3.0] * 3 + [90.0])
    collector = timed(fleet, clock, max_staleness=1, after_s=5.0)
    assert len(collector.collect(1, Timer())[0]) == 4
    clock.moment += 60.0  # the groups of the next step finish during a publication, all but one
    groups, _ = collector.collect(2, Timer())
    assert len(groups) == 3
    assert fleet.aborted == [7]


def test_a_group_that_waits_for_a_worker_is_no_straggler() -> None:
    clock = Told()
    fleet = TimedFleet(clock, [4.0, 4.0, 4.0, 6.0], slots=2)
    groups, _ = timed(fleet, clock, after_s=5.0).collect(1, Timer())
    assert len(groups) == 3
    assert fleet.aborted == [3]
    assert clock.moment == pytest.approx(9.0, abs=0.11)  # it began at 4


def test_a_group_that_waits_during_an_evaluation_is_no_straggler() -> None:
    """The evaluation takes the worker until 60 s, and its end gives the group one before the collector looks."""
    clock = Told()
    fleet = TimedFleet(clock, [4.0] * 7 + [9.0], slots=2)
    collector = timed(fleet, clock, max_staleness=1, after_s=10.0)
    assert len(collector.collect(1, Timer())[0]) == 4
    assert 7 in fleet.queued()
    with collector.while_others_sample():
        clock.moment = 61.0
        fleet.times[7] = 60.0, 69.0
    groups, _ = collector.collect(2, Timer())
    assert len(groups) == 4
    assert fleet.aborted == []

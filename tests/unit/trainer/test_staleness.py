"""Sampling runs ahead of learning: at any timing nothing is lost, doubled, too old or compared with wrong weights."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from random import Random
from threading import Lock
from time import monotonic, sleep
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from launch.demo.tiny_model import make_tokenizer
from qarl.config.run import Config
from qarl.config.task import SortingTaskConfig
from qarl.errors import ConfigError
from qarl.protocols import Prover, UpdateResult
from qarl.quant.scheme import QuantScheme
from qarl.tasks.turns import TurnEncoder
from qarl.types import EnvironmentTurn, Sample, SampleRequest, Score, TrainSequence
from qarl.weights.source import WeightSource
from rollout.conversations import ConversingFleet
from rollout.fleet import RayFleet
from tests.support.fakes import FakeEnvironments, FakeFleet, FakeLearner, FakeRewards, Killed, even_length, logprobs
from tests.support.runs import AUGMENT, GROUP, PROMPTS, Run, make_config, right_half
from tests.support.virtual_ray import VirtualRay
from trainer.checkpoint import CheckpointStore

ENCODER = TurnEncoder(make_tokenizer(64), SortingTaskConfig())
TALK = {"environment": {"kind": "guess"}, "learner": {"max_tokens_per_micro_batch": 4 * 1024}}
Group = Sequence[SampleRequest]
few = settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
fewer = settings(max_examples=12)


class Environments(FakeEnvironments):
    """The more a response says, the longer its conversation goes on."""

    def answer(self, number: int, turn: int, response: str) -> EnvironmentTurn:
        return EnvironmentTurn("7", 0.25, done=len(response) < 3)


class RealFleet(RayFleet):
    """The real one, with two workers in virtual time, of which some die or stop. Remembers what it was asked for."""

    polls = 0

    def __init__(self, virtual: VirtualRay) -> None:
        self.requests, self.switches, self.environments = list[Group](), list[QuantScheme](), Environments()
        super().__init__(virtual.start, QuantScheme("none"), 2, 2 * GROUP, 60.0, 99, [].append)

    def submit(self, groups: Sequence[Group], first: bool = False) -> list[int]:
        self.requests += groups
        return super().submit(groups, first)

    def poll(self, timeout_s: float) -> dict[int, list[Sample]]:
        self.polls += 1
        return super().poll(timeout_s)

    def switch(self, scheme: QuantScheme) -> None:
        assert not self._requests
        self.switches.append(scheme)
        super().switch(scheme)


class CheckedLearner(FakeLearner):
    """Checks that what it learns from has pi_prox of its own weights, and log-probs of the sampler's version."""

    def update(self, minibatches: Sequence[Sequence[TrainSequence]]) -> UpdateResult:
        for sequence in [sequence for minibatch in minibatches for sequence in minibatch]:
            ids, prox_T = sequence.response_ids, sequence.prox_logprobs_T
            assert prox_T is not None
            np.testing.assert_array_equal(prox_T, logprobs(self.theta, ids))
            for version in self.thetas:
                np.testing.assert_array_equal(
                    sequence.at_sampled(sequence.sampler_logprobs_T, version),
                    sequence.at_sampled(logprobs(self.thetas[version], ids), version),
                )
        return super().update(minibatches)


class OneCaller(FakeRewards):
    """Refuses a second caller at the same time, as the real service would have to."""

    def __init__(self) -> None:
        super().__init__(lambda sample: even_length(sample) if sample.score is None else sample.score.reward)
        self._lock = Lock()

    def score(self, samples: Sequence[Sample]) -> list[Score]:
        assert self._lock.acquire(blocking=False), "two callers"
        sleep(1e-3)
        self._lock.release()
        return super().score(samples)


def stale_config(max_staleness: int, talks: bool = False, **sections: dict[str, Any]) -> Config:
    """`talks`: with an environment."""
    sections["learner"] = {"max_tokens_per_micro_batch": 9 * 1024}
    sections |= {"environment": {"kind": "guess"}} if talks else {}
    sections["mismatch"] = {"proof_steps": 99} | sections.get("mismatch", {})
    train = {"steps": 6, "max_staleness": max_staleness, "checkpoint_every": 1} | sections.pop("train", {})
    advantage = {"drop_zero_variance": train.get("dynamic_sampling", 0) > 0}
    return make_config(train=train, advantage=advantage, **sections)


@contextmanager
def run_of(
    folder: Path, config: Config, seed: int, kill_after: int | None = None, learner: CheckedLearner | None = None
) -> Iterator[Run]:
    learner, rewards = learner or CheckedLearner(), OneCaller()
    with VirtualRay(Random(seed), faults=2).installed() as virtual:
        fleet = RealFleet(virtual)
        talks: Any = fleet
        if config.environment.kind != "none":
            talks = ConversingFleet(fleet, fleet.environments, ENCODER, config.environment.max_turns, 32)
        run = Run(folder, config, fleet=talks, learner=learner, rewards=rewards, kill_after=kill_after)
        run.fleet = cast(Any, fleet)
        yield run


def versions_of(sequence: TrainSequence) -> list[int]:
    return [sequence.version] if sequence.versions_T is None else sequence.versions_T.tolist()


def check(run: Run, max_staleness: int) -> None:
    """Version bounds, no doubled sample, and every drawn prompt either learned, given back or in flight."""
    for step, minibatches in zip(run.steps("actor/updates"), run.learner.minibatches, strict=True):
        for sequence in (sequence for minibatch in minibatches for sequence in minibatch):
            versions = versions_of(sequence)
            assert versions == sorted(versions)
            assert versions[-1] == sequence.version
            assert {step - 1 - version for version in versions} <= set(range(max_staleness + 1))
    training = {prompt.id for prompt in PROMPTS}
    asked = [request for requests in run.fleet.requests for request in requests if request.prompt.id in training]
    assert len({request.seed for request in asked}) == len(asked), "a sample was asked for twice"
    flights = [prompt_id for prompt_id, _ in run.trainer._collector.in_flight()]
    assert sorted(flights) == sorted(set(flights)) == run.pool.state_dict()["in_flight"]
    assert len(run.fleet.environments.open) <= len(flights) * GROUP
    assert sum(record.visits for record in run.pool._records.values()) * GROUP == run.trainer.progress.rollouts


@few
@given(
    *(st.integers(0, 5), st.integers(0, 10**6), st.sampled_from(["wait", "keep", "return"])),
    *(st.booleans(), st.booleans(), st.sampled_from([0.0, 0.4, 1.0])),
)
def test_nothing_is_lost_doubled_or_too_old(
    max_staleness: int, seed: int, kind: str, partial: bool, talks: bool, share: float
) -> None:
    if kind == "keep" and not max_staleness:
        kind = "wait"
    rollout = {"stragglers": {"kind": kind, "after_s": 1e-3}, "partial": partial and max_staleness > 0}
    config = stale_config(
        max_staleness, talks, rollout=rollout, mismatch={"stale_share": share if max_staleness else 0}
    )
    with tempfile.TemporaryDirectory() as folder, run_of(Path(folder), config, seed) as run:
        run.trainer.run()
    check(run, max_staleness)
    if kind == "wait":
        assert [len(m) for m in run.learner.minibatches] == [2] * 6
        assert run.trainer.progress.rollouts == 6 * 4 * GROUP
    ages = run.values("staleness/age_max")
    assert len(ages) == (len(run.learner.minibatches) if max_staleness else 0)  # none where all groups were too late
    assert all(age <= max_staleness for age in ages)
    assert set(run.values("mismatch/logp_abs_max")) <= {0.0}
    counts = run.values("staleness/continued"), run.values("staleness/segments")
    sequences = [[s for minibatch in update for s in minibatch] for update in run.learner.minibatches]
    flat = [s for of_step in sequences for s in of_step]
    if kind == "wait" and max_staleness:
        versions = [[len(set(versions_of(s))) for s in of_step] for of_step in sequences]
        assert counts[0] == [sum(count > 1 for count in of_step) for of_step in versions]
        assert counts[1] == list(map(sum, versions))
    if share and max_staleness:
        steps = zip(run.steps("actor/updates"), sequences, strict=True)
        stale = [sum(v < step - 1 for s in of_step for v in set(versions_of(s))) for step, of_step in steps]
        assert run.values("mismatch/stale_compared") == [math.ceil(share * count) for count in stale]
    if talks and not (partial and max_staleness):  # what was sampled is what each turn was asked to follow on
        asked = {request.prompt.token_ids for requests in run.fleet.requests for request in requests}
        assert {(s.prompt_ids + s.response_ids)[: len(s.prompt_ids) + a] for s in flat for a, _ in s.turns} <= asked
    if talks and kind == "wait":
        assert not run.fleet.environments.open


@fewer
@given(st.integers(1, 5), st.integers(0, 10**6), st.integers(1, 3), st.booleans())
def test_dynamic_sampling_loses_and_doubles_nothing(max_staleness: int, seed: int, refills: int, partial: bool) -> None:
    train = {"dynamic_sampling": refills, "checkpoint_every": 6}
    config = stale_config(max_staleness, train=train, rollout={"partial": partial})
    with tempfile.TemporaryDirectory() as folder, run_of(Path(folder), config, seed) as run:
        run.trainer.run()
    check(run, max_staleness)
    assert sum(run.values("train/groups_sampled")) * GROUP == run.trainer.progress.rollouts
    for used, sampled in zip(run.values("actor/groups_used"), run.values("train/groups_sampled"), strict=True):
        assert used == 4.0 or 4.0 <= sampled <= 4.0 * (1 + refills)
    assert all(s.advantage for update in run.learner.minibatches for minibatch in update for s in minibatch)


def test_dynamic_sampling_takes_groups_of_later_steps_in_the_order_of_the_draws(tmp_path: Path) -> None:
    config = stale_config(2, train={"steps": 3, "dynamic_sampling": 9}, pool={"cooldown_steps": 0})
    run = Run(tmp_path, config, rewards=FakeRewards(right_half), learner=CheckedLearner())
    run.trainer.run()
    assert run.trainer._collector.in_flight() == []
    drawn = [r.prompt.id for requests in run.fleet.requests for r in requests[::GROUP] if r.prompt in PROMPTS]
    informative = iter([prompt for prompt in drawn if int(prompt[1:]) % 2])
    for update in run.learner.minibatches:
        learned = {s.id.partition("#")[0] for minibatch in update for s in minibatch}
        assert learned == {next(informative) for _ in range(4)}


@fewer
@given(st.integers(1, 4), st.integers(0, 10**6), st.booleans())
def test_the_policy_writes_problems_while_sampling_runs_ahead(max_staleness: int, seed: int, partial: bool) -> None:
    """A request of a later step goes out when all earlier ones are read, and each problem comes to one end."""
    rollout = {"partial": partial}
    pool, train = {"augment": AUGMENT, "cooldown_steps": 0}, {"steps": 8, "checkpoint_every": 8}
    config = stale_config(max_staleness, train=train, pool=pool, rollout=rollout)
    with tempfile.TemporaryDirectory() as folder, run_of(Path(folder), config, seed) as run:
        run.trainer.run()
    check(run, max_staleness)
    asked = run.trainer._collector._asked
    assert run.augmenter
    counts = run.augmenter.metrics()
    ended = len(run.tracker.outcomes) + len(run.augmenter.outcomes())
    assert counts["augment/requested"] == ended + counts["augment/pending"] + len(asked) > 0


@fewer
@given(st.integers(1, 4), st.integers(0, 10**6), st.booleans(), st.booleans())
def test_no_sample_outlives_a_switch_of_the_precision(
    max_staleness: int, seed: int, partial: bool, talks: bool
) -> None:
    rollout: dict[str, Any] = {"schedule": [{"from_step": 3, "scheme": "w4a16"}, {"from_step": 5, "scheme": "w4a8"}]}
    rollout |= {"partial": partial, "stragglers": {"kind": "keep", "after_s": 1e6}}
    train = {"checkpoint_every": 6}
    config = stale_config(max_staleness, talks, rollout=rollout, train=train)
    with tempfile.TemporaryDirectory() as folder, run_of(Path(folder), config, seed) as run:
        run.trainer.run()
    check(run, max_staleness)
    assert len(run.fleet.switches) == 2
    assert run.values("train/too_old") == [0.0] * 6  # what a switch gives back is none of them
    assert run.trainer.progress.rollouts == 6 * 4 * GROUP
    for step, update in enumerate(run.learner.minibatches, 1):
        stage = max(first for first in (1, 3, 5) if first <= step)
        assert all(versions_of(s)[0] >= stage - 1 for minibatch in update for s in minibatch)


@few
@given(st.integers(1, 4), st.integers(0, 10**6), st.integers(0, 2), st.booleans(), st.data())
def test_a_killed_run_resumes_what_was_in_flight(
    max_staleness: int, seed: int, refills: int, talks: bool, data: st.DataObject
) -> None:
    config = stale_config(max_staleness, talks, train={"dynamic_sampling": refills})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with suppress(Killed), run_of(folder, config, seed, kill_after=data.draw(st.integers(0, 250))) as run:
            run.trainer.run()
        if saved := CheckpointStore(folder, 2).latest(print):
            with run_of(folder, config, seed + 1) as again:
                again.trainer._publish(again.trainer.progress.step)
                again.trainer._collector.resume(again.trainer._in_flight)
                assert [list(flight) for flight in again.trainer._collector.in_flight()] == saved[1]["in_flight"]
                assert again.pool.state_dict()["in_flight"] == saved[1]["pool"]["in_flight"]
        with run_of(folder, config, seed + 1) as again:
            again.trainer.run()
        assert again.trainer.progress.step == 6
        check(again, max_staleness)
        assert refills or again.trainer.progress.rollouts == 6 * 4 * GROUP


def test_one_step_off_samples_the_next_step_while_this_one_is_learned(tmp_path: Path) -> None:
    run = Run(tmp_path, stale_config(1, tracking={"table_every": 1}), learner=CheckedLearner())
    run.trainer.run()
    versions = [{s.version for m in update for s in m} for update in run.learner.minibatches]
    assert versions == [{0}, {0}, {1}, {2}, {3}, {4}]
    assert run.values("staleness/age_mean") == [0.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    assert run.steps("mismatch/logp_abs_max") == [1]  # the only samples of the learner's own version
    assert run.values("staleness/k3_kl")[0] == 0.0
    assert any(value > 0 for value in run.values("staleness/k3_kl"))
    mismatch, staleness = ([row[name] for row in run.tracker.table_rows] for name in ("mismatch", "staleness"))
    assert mismatch == pytest.approx([0.0] * 16 + [math.nan] * 80, nan_ok=True)
    assert np.isnan(staleness).tolist() == [True] * 16 + [False] * 80
    assert max(staleness[16:]) > 0.0


class Interrupted(FakeFleet):
    """Holds the groups that `holds` says. New weights sample their responses anew from the token that `kept` says."""

    def __init__(self) -> None:
        super().__init__()
        self.environments, self.asked = Environments(), dict[int, Group]()
        self.held: dict[int, tuple[int, list[Sample]]] = {}  # first the number of loads before

    def holds(self, number: int, loads: int) -> bool:
        """Whether a group of then is not finished yet."""
        raise NotImplementedError

    def continued(self, sample: Sample, request: SampleRequest) -> Sample:
        raise NotImplementedError

    def submit(self, groups: Sequence[Group]) -> list[int]:
        numbers = super().submit(groups)
        self.asked |= zip(numbers, groups, strict=True)
        self.held |= {number: (len(self.loads), self.finished.pop(number)) for number in numbers}
        return numbers

    def poll(self, timeout_s: float) -> dict[int, list[Sample]]:
        over = [number for number, (loads, _) in self.held.items() if not self.holds(number, loads)]
        return {number: self.held.pop(number)[1] for number in over}

    def abort(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            del self.held[number]

    def load(self, weights: WeightSource, prover: Prover | None = None) -> dict[int, float]:
        gaps = super().load(weights, prover)
        for number, (loads, group) in self.held.items():
            pairs = zip(group, self.asked[number], strict=True)
            self.held[number] = loads, [self.continued(*pair) for pair in pairs]
        return gaps


KEEP = stale_config(1, rollout={"stragglers": {"kind": "keep", "after_s": 1e-3}, "partial": True})


class Holding(Interrupted):
    """Holds a group until version `until` is there; each newer version samples all but its first tokens anew."""

    def __init__(self, number: int, until: int) -> None:
        super().__init__()
        self.number, self.until = number, until

    def holds(self, number: int, loads: int) -> bool:
        return number == self.number and len(self.loads) <= self.until

    def continued(self, sample: Sample, request: SampleRequest) -> Sample:
        return self.engines[0].continued(sample, request, 1)


def test_a_response_is_as_old_as_its_oldest_segment(tmp_path: Path) -> None:
    run = Run(tmp_path, KEEP, fleet=Holding(0, 2), learner=CheckedLearner(), rewards=OneCaller())
    run.trainer.run()
    check(run, 1)
    assert run.values("train/too_old") == [0, 0, 1, 0, 0, 0]


@pytest.mark.parametrize(
    ("number", "kept", "too_old"),
    [(0, [1, 1, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0]), (23, [0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 0])],
)
def test_a_straggler_is_kept_until_it_is_too_old_or_the_run_ends(
    tmp_path: Path, number: int, kept: list[int], too_old: list[int]
) -> None:
    fleet = Holding(number, 99)
    run = Run(tmp_path, KEEP, fleet=fleet, learner=CheckedLearner(), rewards=OneCaller())
    run.trainer.run()
    check(run, 1)
    assert (run.values("train/kept"), run.values("train/too_old")) == (kept, too_old)
    assert list(fleet.held) == ([23] if number == 23 else [])
    assert run.trainer.progress.rollouts == (23 if number == 23 else 24) * GROUP


class OldKeys(Interrupted):
    """Holds every second group, from the second step on, until new weights interrupt it. What an interrupted response
    goes on with has log-probs of no learner."""

    def holds(self, number: int, loads: int) -> bool:
        return number >= 4 and number % 2 == 0 and loads == len(self.loads)

    def continued(self, sample: Sample, request: SampleRequest) -> Sample:
        new = self.engines[0].continued(sample, request, len(sample.response_ids) // 2)
        old_keys_T = 0.0 if new.versions_T is None else (new.versions_T > new.versions_T[0]).astype(np.float32)
        return replace(new, logprobs_T=new.logprobs_T - 0.25 * old_keys_T)


@pytest.mark.parametrize("keep_kv", [False, True])
def test_responses_that_keep_old_keys_count_for_no_proof(tmp_path: Path, keep_kv: bool) -> None:
    """They are scored always, counted, and measured apart from all others."""
    rollout = {"partial": True, "keep_kv": keep_kv}
    settings = {"learner": {"prox": "auto"}, "mismatch": {"proof_steps": 1, "stale_share": 1.0}}
    run = Run(tmp_path, stale_config(1, rollout=rollout, **settings), fleet=OldKeys(), rewards=OneCaller())
    run.trainer.run()
    kept, gaps = run.values("staleness/kept_kv"), run.values("mismatch/kept_kv_logp_abs_max")
    assert (max(run.values("mismatch/logp_abs_max")) > 0.0) == (not keep_kv)
    if keep_kv:
        assert kept == run.values("staleness/continued")
        assert sum(kept) > 0
        assert max(gaps) == pytest.approx(0.25, abs=1e-6)
        assert run.steps("timing_s/prox") == run.steps("staleness/kept_kv")
        assert run.tracker.alerts == []
    else:
        assert kept == gaps == []


class SavesLast(CheckedLearner):
    """Writes its checkpoint when others have gone on."""

    fleet: RealFleet

    def save(self, directory: str) -> None:
        before, until = self.fleet.polls, monotonic() + 60.0
        while self.fleet.polls < before + 9:
            assert monotonic() < until, "nothing is sampled meanwhile"
            sleep(1e-3)
        super().save(directory)


def test_sampling_goes_on_while_a_checkpoint_is_written(tmp_path: Path) -> None:
    learner = SavesLast()
    with run_of(tmp_path, stale_config(1, train={"steps": 3}), 0, learner=learner) as run:
        learner.fleet = cast(Any, run.fleet)
        run.trainer.run()
    check(run, 1)
    for folder in sorted(tmp_path.iterdir()):
        state = json.loads((folder / "state.json").read_text())
        assert sorted(prompt for prompt, _ in state["in_flight"]) == state["pool"]["in_flight"]


def test_engines_get_weights_as_often_as_the_bound_needs(tmp_path: Path) -> None:
    run = Run(tmp_path, stale_config(4, eval={"every": 99}), learner=CheckedLearner())
    run.trainer.run()
    assert [weights.manifest.version for weights in run.fleet.loads] == [0, 3, 6]
    assert max(run.values("staleness/age_max")) <= 4.0


@pytest.mark.parametrize(
    ("sections", "key"),
    [
        ({"train": {"max_staleness": 1}, "rollout": {"transport": "nccl"}}, "rollout.transport"),
        ({"train": {"max_staleness": 1}, "rollout": {"partial": True}, **TALK}, "learner.max_tokens_per_micro_batch"),
        ({"rollout": {"stragglers": {"kind": "keep"}}}, "rollout.stragglers.kind"),
        ({"mismatch": {"stale_share": 0.1}}, "mismatch.stale_share"),
        (
            {"train": {"max_staleness": 1}, "mismatch": {"stale_share": 0.1}, "learner": {"zero_stage": 3}},
            "mismatch.stale_share",
        ),
        ({"rollout": {"partial": True}}, "rollout.partial"),
        ({"train": {"max_staleness": 1}, "rollout": {"keep_kv": True}}, "rollout.keep_kv"),
        ({"train": {"max_staleness": 1}, "rollout": {"partial": True, "max_num_seqs": 4}}, "rollout.max_num_seqs"),
        ({"train": {"max_staleness": 4}, "rollout": {"partial": True}}, "learner.max_tokens_per_micro_batch"),
    ],
)
def test_what_works_in_turn_only_is_refused(sections: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        make_config(**sections)

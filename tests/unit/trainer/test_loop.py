"""The training loop among fakes: the order of things, what is learned from, pi_prox, resuming."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qarl.errors import CheckpointError, DivergenceError
from qarl.protocols import Prover, UpdateResult
from qarl.types import TrainSequence
from qarl.weights.source import PublishedWeights, WeightSource
from tests.support.fakes import FakeEngine, FakeLearner, FakeRewards, Killed
from tests.support.runs import AUGMENT, GROUP, HELDOUT, PROMPTS, Run, make_config, right_half
from tests.support.timing import TimedFleet, Told
from trainer.checkpoint import CheckpointStore

EAGER = {"exploration": 0.0, "cooldown_steps": 0}
VOTE = {"kind": "vote", "answer_pattern": "([0-9])", "threshold": 0.1}


# --- order of things -------------------------------------------------------------------------------------------------


def test_every_step_publishes_the_next_version_and_samples_it(tmp_path: Path) -> None:
    run = Run(tmp_path, make_config())
    run.trainer.run()
    assert [weights.manifest.version for weights in run.fleet.loads] == [0, 1, 2, 3, 4]
    thetas = [float(weights.tensors[0].data[0]) for weights in run.fleet.loads]
    assert thetas[-1] == run.learner.theta
    assert len(set(thetas)) > 1
    assert run.trainer.progress.step == 4
    assert run.trainer.progress.rollouts == 4 * 4 * GROUP


def test_scheduled_precision_switches_learner_and_engines_before_the_step(tmp_path: Path) -> None:
    stages = [{"from_step": 3, "scheme": "w4a16", "group_size": 64}]
    rollout = make_config().rollout.model_dump() | {"schedule": stages}
    run = Run(tmp_path, make_config(rollout=rollout))
    run.trainer.run()
    assert [scheme.label for scheme in run.learner.switches] == ["w4a16-g64"]
    assert run.fleet.switches == run.learner.switches
    # The weights of version 2 are published again, to the new engines.
    assert [weights.manifest.version for weights in run.fleet.loads] == [0, 1, 2, 2, 3, 4]
    assert any(line.startswith("step 3: rollouts and training in w4a16-g64") for line in run.tracker.notes)
    plain = Run(tmp_path / "plain", make_config())
    plain.trainer.run()
    assert plain.state() == run.state()
    again = Run(tmp_path, make_config(rollout=rollout, train={"steps": 5}))
    again.trainer.run()  # resumed within the second stage
    assert len(again.fleet.switches) == 1


def test_engines_on_the_learners_gpu_sleep_while_it_works(tmp_path: Path) -> None:
    """A fake that sleeps neither samples nor loads. The probe is sampled and scored when all are awake."""
    config = make_config(mismatch={"proof_every": 1, "unaligned_every": 1}, tracking={"table_every": 1})
    run, plain = Run(tmp_path / "shared", config, sleeps=True), Run(tmp_path / "alone", config)
    assert run.trainer.run() == plain.trainer.run()
    assert run.state() == plain.state()
    shared, alone = ([n for n in r.fuse.names if n.startswith(("fleet", "learner"))] for r in (run, plain))
    learns = ["learner.score", "learner.score", "learner.update", "learner.score"]  # prox, unaligned, table
    publishes = ["learner.publish", "fleet.wake", "fleet.load", "learner.score", "fleet.queued"]
    evaluation, checkpoint = ["fleet.queued", "fleet.sample"], "learner.save"
    samples = ["fleet.submit", "fleet.poll", "fleet.queued", "fleet.sleep"]
    step = ["fleet.busy_s", *samples, *learns, *publishes, "fleet.busy_s"]
    two = [*step, *step, *evaluation, checkpoint]
    assert shared == [*publishes, *evaluation, *two, *step, *step, checkpoint, *evaluation]
    assert alone == [name for name in shared if name not in ("fleet.sleep", "fleet.wake")]
    assert run.steps("timing_s/sleep") == [1, 2, 3, 4]


def test_requests_are_groups_of_distinct_seeds_at_the_training_temperature(tmp_path: Path) -> None:
    run = Run(tmp_path, make_config())
    run.trainer.run()
    training = [r for requests in run.fleet.requests for r in requests if r.prompt in PROMPTS]
    assert len({request.seed for request in training}) == len(training) == 4 * 4 * GROUP
    assert {(request.temperature, request.max_new_tokens) for request in training} == {(0.8, 8)}
    for start in range(0, len(training), GROUP):
        assert len({request.prompt.id for request in training[start : start + GROUP]}) == 1


def test_schedule_of_evaluations_tables_and_checkpoints(tmp_path: Path) -> None:
    run = Run(tmp_path, make_config(train={"steps": 5}))
    final = run.trainer.run()
    assert run.steps("eval/pass@1") == [0, 2, 4, 5]
    held_out = [requests for requests in run.fleet.requests if requests[0].prompt in HELDOUT]
    assert [len(requests) for requests in held_out] == [9 * 3, 5 * 3, 5 * 3, 9 * 3]  # 2 samples and a greedy one
    logged = {"eval/num_prompts": 9.0, **{f"eval/{name}": value for name, value in final.items()}}
    assert logged == run.tracker.rows[-1][1]
    assert run.values("eval/num_prompts") == [9.0, 5.0, 5.0, 9.0]
    assert run.trainer.progress.eval_before["pass@1"] == run.values("eval/pass@1")[0]
    assert run.tracker.tables == [(3, 4 * GROUP, "samples")]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000004", "step_000005"]


def test_the_last_step_is_evaluated_once(tmp_path: Path) -> None:
    run = Run(tmp_path, make_config(train={"steps": 4}))
    run.trainer.run()
    assert run.steps("eval/pass@1") == [0, 2, 4]


def test_metrics_of_a_step(tmp_path: Path) -> None:
    config = make_config(mismatch={"proof_every": 1})
    run = Run(tmp_path, config, rewards=FakeRewards(lambda sample: float(sample.worker)))
    run.trainer.run()
    assert run.steps("timing_s/step") == [1, 2, 3, 4]
    for name in ("pool", "sample", "reward", "prox", "update", "publish"):
        assert run.steps(f"timing_s/{name}") == [1, 2, 3, 4]
    assert all(value > 0 for value in run.values("perf/tokens_per_s") + run.values("perf/sample_tokens_per_s"))
    assert run.values("perf/workers_idle") == [1.0] * 4  # the fake takes no time
    # Two workers by turns: half of each group is right.
    assert run.values("reward/mean") == [0.5] * 4
    assert run.values("reward/std") == [0.5] * 4
    assert run.values("reward/informative_groups") == [1.0] * 4
    assert run.values("reward/faults") == [0.0] * 4
    assert run.values("mismatch/logp_abs_max") == [0.0] * 4
    assert run.values("mismatch/probe_logp_abs_max") == [0.0] * 4
    assert run.values("pool/in_flight") == [0.0] * 4
    assert run.values("actor/updates") == [2.0] * 4


class TimedLearner(FakeLearner):
    """Its calls take seconds of a clock."""

    def __init__(self, clock: Told) -> None:
        super().__init__()
        self._clock = clock

    def score(self, *args: Any, **kwargs: Any) -> list[Any]:
        self._clock.moment += 2.0
        return super().score(*args, **kwargs)

    def update(self, minibatches: Sequence[Sequence[TrainSequence]]) -> UpdateResult:
        self._clock.moment += 5.0
        return super().update(minibatches)

    def publish(self, version: int) -> PublishedWeights:
        self._clock.moment += 1.0
        return super().publish(version)


class SlowToLoad(TimedFleet):
    def load(self, weights: WeightSource, prover: Prover | None = None) -> dict[int, float]:
        self._clock.moment += 10.0
        return super().load(weights, prover)


def test_the_learner_is_idle_while_it_has_no_call(tmp_path: Path) -> None:
    clock = Told()
    fleet = SlowToLoad(clock, [19.0] * 16)
    config = make_config(mismatch={"proof_every": 1, "unaligned_every": 2})
    run = Run(tmp_path, config, fleet=fleet, learner=TimedLearner(clock), clock=clock)
    run.trainer.run()
    # Prox 2 s, update 5 s, publish 1 s, the probe's scores 2 s; in steps 2 and 4 the unaligned model 2 s, in step 3 the
    # table 2 s. It waits for samples (19 s) and for engines that load (10 s).
    busy = [10.0, 12.0, 12.0, 12.0]
    assert run.values("timing_s/step") == pytest.approx([29.0 + seconds for seconds in busy])
    assert run.values("perf/learner_idle") == pytest.approx([29.0 / (29.0 + seconds) for seconds in busy])
    assert run.values("perf/workers_idle") == pytest.approx([1.0 - 19.0 / (29.0 + seconds) for seconds in busy])


def test_a_step_without_prompts_goes_on(tmp_path: Path) -> None:
    run = Run(tmp_path, make_config(train={"prompts_per_step": 24}, pool={"cooldown_steps": 2}))
    run.trainer.run()
    training = [requests for requests in run.fleet.requests if not requests or requests[0].prompt in PROMPTS]
    assert [len(requests) // GROUP for requests in training] == [24, 0, 0, 24]  # all rest, then all come back
    assert run.steps("reward/mean") == [1, 4]
    assert run.steps("timing_s/step") == [1, 2, 3, 4]
    assert run.trainer.progress.rollouts == 2 * 24 * GROUP


def test_divergence_names_the_sequence_and_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path, make_config(train={"steps": 1}))

    def diverge(minibatches: Sequence[Sequence[TrainSequence]]) -> UpdateResult:
        raise DivergenceError(f"NaN in {[s.id for m in minibatches for s in m][:GROUP]}", hint="stop")

    monkeypatch.setattr(run.learner, "update", diverge)
    with pytest.raises(DivergenceError, match=r"^step 1: NaN in \['(p\d+)#0', '\1#1', '\1#2', '\1#3'\]; stop$"):
        run.trainer.run()


def test_the_unaligned_gap_is_measured_when_asked(tmp_path: Path) -> None:
    run = Run(tmp_path, make_config(mismatch={"unaligned_every": 2, "unaligned_sequences": 3, "proof_every": 1}))
    run.trainer.run()
    assert run.learner.unaligned == [3, 3]
    assert run.steps("mismatch/unaligned_logp_abs_max") == run.steps("timing_s/unaligned") == [2, 4]
    assert run.values("mismatch/unaligned_logp_abs_mean") == pytest.approx([0.5, 0.5], abs=1e-5)
    assert run.values("mismatch/logp_abs_max") == [0.0] * 4


# --- what is learned from --------------------------------------------------------------------------------------------


def test_groups_without_variance_are_left_out_and_the_rest_stay_whole(tmp_path: Path) -> None:
    run = Run(tmp_path, make_config(train={"prompts_per_step": 8}), rewards=FakeRewards(right_half))
    run.trainer.run()
    used = [minibatch for update in run.learner.minibatches for minibatch in update]
    assert run.values("actor/groups_used") == [
        len([s for m in update for s in m]) / GROUP for update in run.learner.minibatches
    ]
    assert 0 < sum(run.values("actor/groups_used")) < 8 * 4
    for minibatch in used:
        assert len(minibatch) % GROUP == 0
        for start in range(0, len(minibatch), GROUP):
            group = minibatch[start : start + GROUP]
            assert len({sequence.prompt_ids for sequence in group}) == 1
            # (R - mean) / (std + 1e-6) of rewards 0, 1, 0, 1
            assert [sequence.advantage for sequence in group] == pytest.approx([-1, 1, -1, 1], abs=1e-5)


def test_a_step_without_an_informative_group_goes_on_without_update(tmp_path: Path) -> None:
    run = Run(tmp_path, make_config(), rewards=FakeRewards(lambda _: 1.0))
    run.trainer.run()
    assert run.learner.minibatches == []
    assert run.steps("timing_s/update") == []
    assert run.values("actor/groups_used") == [0.0] * 4
    assert [weights.manifest.version for weights in run.fleet.loads] == [0, 1, 2, 3, 4]


def test_all_groups_are_used_when_none_is_dropped(tmp_path: Path) -> None:
    config = make_config(advantage={"drop_zero_variance": False})
    run = Run(tmp_path, config, rewards=FakeRewards(lambda _: 1.0))
    run.trainer.run()
    assert run.values("actor/groups_used") == [4.0] * 4
    assert {s.advantage for update in run.learner.minibatches for m in update for s in m} == {0.0}


ODD_DIGITS = {"ngram": 1, "ngram_count": 2, "probability": 0.0, "table_every": 2, "table_rows": 3}
"""A token that stands twice in its response is an error token."""


def test_error_tokens_are_measured_and_the_worst_shown(tmp_path: Path) -> None:
    run = Run(tmp_path, make_config(error_tokens=ODD_DIGITS))
    run.trainer.run()
    assert run.steps("error_tokens/share") == [1, 2, 3, 4]
    assert all(0 < share < 1 for share in run.values("error_tokens/share"))
    shown = {step: rows for step, rows, name in run.tracker.tables if name == "error_tokens"}
    assert shown.keys() == {2, 4}
    assert max(shown.values()) == 3
    assert all(s.loss_mask_T is None for call in run.learner.minibatches for batch in call for s in batch)
    quiet = Run(tmp_path / "off", make_config(error_tokens={"mode": "off"}))
    quiet.trainer.run()
    assert quiet.steps("error_tokens/share") == []
    assert quiet.learner.theta == run.learner.theta


def test_masked_tokens_leave_the_loss_and_wholly_masked_responses_the_batch(tmp_path: Path) -> None:
    run = Run(tmp_path, make_config(error_tokens={**ODD_DIGITS, "mode": "mask"}))
    run.trainer.run()
    learnt = [s for call in run.learner.minibatches for batch in call for s in batch]
    partly = 0
    for sequence in learnt:
        assert sequence.loss_mask_T is not None
        assert sequence.prox_logprobs_T is not None
        kept = [sequence.response_ids.count(token) == 1 for token in sequence.response_ids]
        assert sequence.loss_mask_T.tolist() == kept
        assert sequence.loss_tokens == sum(kept) > 0
        assert len(sequence.prox_logprobs_T) == len(sequence.response_ids)
        partly += not all(kept)
    assert partly
    everything = {"mode": "mask", "probability": 1.0, "probability_run": 1}
    nothing_left = Run(tmp_path / "all", make_config(error_tokens=everything))
    nothing_left.trainer.run()
    assert nothing_left.learner.minibatches == []
    assert nothing_left.values("error_tokens/share") == [1.0] * 4


# --- pi_prox ---------------------------------------------------------------------------------------------------------


class DriftsOnce(FakeEngine):
    """Reports slightly other log-probs under version 2."""

    def load(self, weights: PublishedWeights) -> None:
        super().load(weights)
        self.drift = 0.01 if weights.manifest.version == 2 else 0.0


@pytest.mark.parametrize(
    ("prox", "engine", "scored"),
    [
        ("auto", FakeEngine, [1, 2, 3, 7]),
        ("auto", DriftsOnce, [1, 2, 3, 4, 5, 6, 7]),  # step 3 breaks the proof; 4, 5 and 6 make it again
        ("recompute", FakeEngine, [1, 2, 3, 4, 5, 6, 7, 8]),
    ],
)
def test_the_samplers_logprobs_are_trusted_after_the_proof_only(
    tmp_path: Path, prox: str, engine: type[FakeEngine], scored: list[int]
) -> None:
    config = make_config(
        train={"steps": 8}, learner={"prox": prox, "minibatches": 2}, mismatch={"proof_steps": 3, "proof_every": 7}
    )
    run = Run(tmp_path, config, engines=[engine(0)], exact=False)
    run.trainer.run()
    assert run.steps("timing_s/prox") == run.steps("mismatch/logp_abs_max") == scored


@pytest.mark.parametrize("prox", ["recompute", "auto"])
def test_prox_belongs_to_its_sequence(tmp_path: Path, prox: str) -> None:
    config = make_config(learner={"prox": prox, "minibatches": 2}, mismatch={"proof_steps": 1})
    run = Run(tmp_path, config, rewards=FakeRewards(right_half))
    run.trainer.run()
    learned = [s for update in run.learner.minibatches for minibatch in update for s in minibatch]
    assert learned
    for sequence in learned:
        assert sequence.prox_logprobs_T is not None
        np.testing.assert_array_equal(sequence.prox_logprobs_T, sequence.sampler_logprobs_T)


def test_a_ratio_deviation_ends_the_trust_in_the_sampler(tmp_path: Path) -> None:
    """The learner measures it, whatever the objective reports."""
    config = make_config(train={"steps": 8}, learner={"prox": "auto"}, mismatch={"proof_steps": 2})
    run = Run(tmp_path, config)
    run.learner.ratio_devs = [0.0, 0.0, 0.0, 1e-6]
    run.trainer.run()
    assert run.values("actor/seq_ratio_max_dev_first_minibatch") == [0.0, 0.0, 0.0, 1e-6, 0.0, 0.0, 0.0, 0.0]
    assert run.steps("timing_s/prox") == [1, 2, 5, 6]
    ((title, line),) = run.tracker.alerts
    assert title == "mismatch no longer zero"
    assert line.startswith("step 4: the first minibatch has max |r_seq - 1| 1.00e-06")


# --- resume ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"pool": {"augment": AUGMENT, **EAGER}},
        {"pool": {"augment": {**AUGMENT, "validator": VOTE}, **EAGER}},
    ],
    ids=["plain", "augmented", "voted"],
)
def test_a_run_killed_at_any_call_ends_as_if_it_had_not_been(tmp_path: Path, sections: dict[str, Any]) -> None:
    config = make_config(train={"steps": 5}, learner={"prox": "auto"}, mismatch={"proof_steps": 2}, **sections)
    whole = Run(tmp_path / "whole", config)
    result = whole.trainer.run()
    assert bool(sections) == any(not outcome.reason for _, outcome in whole.tracker.outcomes)
    resumed_at = set()
    for calls in range(whole.fuse.made):
        directory = tmp_path / f"killed_{calls}"
        with pytest.raises(Killed):
            Run(directory, config, kill_after=calls).trainer.run()
        again = Run(directory, config)
        resumed_at.add(again.trainer.progress.step)
        assert again.trainer.run() == result
        assert again.state() == whole.state()
        assert again.fleet.requests == whole.fleet.requests[-len(again.fleet.requests) :]
    assert resumed_at == {0, 2, 4, 5}


@pytest.mark.parametrize("missing", [["pool"], ["progress"], ["augment"], ["pool", "augment"]])
def test_a_checkpoint_that_lacks_a_part_is_refused(tmp_path: Path, missing: list[str]) -> None:
    run = Run(tmp_path, make_config(train={"steps": 2}, pool={"augment": AUGMENT}))
    run.trainer.run()
    saved = CheckpointStore(tmp_path, 2).latest(print)
    assert saved is not None
    theta = run.learner.theta
    with pytest.raises(CheckpointError, match=f"its state has no {' and no '.join(missing)}; delete"):
        run.trainer.resume(saved[0], {key: value for key, value in saved[1].items() if key not in missing})
    with pytest.raises(CheckpointError, match="its progress is damaged"):
        run.trainer.resume(saved[0], {**saved[1], "progress": {"stepz": 1}})
    assert run.learner.theta == theta


def test_a_finished_run_continues_to_more_steps(tmp_path: Path) -> None:
    long = Run(tmp_path / "long", make_config(train={"steps": 6}))
    long.trainer.run()
    Run(tmp_path / "short", make_config(train={"steps": 3})).trainer.run()
    more = Run(tmp_path / "short", make_config(train={"steps": 6}))
    more.trainer.run()
    assert more.steps("timing_s/step") == [4, 5, 6]
    assert more.state() == long.state()


def test_a_checkpoint_of_before_with_a_count_of_exact_steps_is_read(tmp_path: Path) -> None:
    run = Run(tmp_path, make_config(train={"steps": 2}))
    run.trainer.run()
    saved = CheckpointStore(tmp_path, 2).latest(print)
    assert saved is not None
    run.trainer.resume(saved[0], {**saved[1], "progress": {**saved[1]["progress"], "exact_steps": 2}})
    assert vars(run.trainer.progress) == saved[1]["progress"]


def test_a_step_that_trains_nothing_says_so(tmp_path: Path) -> None:
    """The pool of 24 prompts gives 20 in the first step, 4 in the second, and then rests."""
    run = Run(tmp_path, make_config(train={"prompts_per_step": 20}, pool={"cooldown_steps": 5}))
    run.trainer.run()
    said = [note for note in run.tracker.notes if "trains nothing" in note]
    assert said == [f"step {n} trains nothing: no prompt could be drawn, all rest or are retired" for n in (3, 4)]


def test_a_step_of_equal_rewards_says_so(tmp_path: Path) -> None:
    run = Run(tmp_path, make_config(train={"steps": 1}), rewards=FakeRewards(lambda sample: 1.0))
    run.trainer.run()
    assert "step 1 trains nothing: in each of its 4 groups all rewards are equal" in run.tracker.notes

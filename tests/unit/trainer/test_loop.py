"""The training loop and the evaluation among fakes, with the real prompt pool and checkpoints."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.run.augment import make_augmenter
from qarl.config.io import validate
from qarl.config.run import Config
from qarl.config.task import SortingTaskConfig
from qarl.errors import CheckpointError, DivergenceError, MismatchError, PublicationError, RolloutError
from qarl.prompts.pool import make_pool
from qarl.tasks import make_task
from qarl.tasks.sorting import is_heldout, solve
from qarl.types import Sample, SampleRequest, Score, TrainSequence
from qarl.weights.source import PublishedWeights
from tests.support.fakes import FakeEngine, FakeFleet, FakeLearner, FakeRewards, FakeTracker, Fuse, Killed, make_prompts
from trainer.checkpoint import CheckpointStore
from trainer.collect import Group
from trainer.evaluate import evaluate
from trainer.loop import Trainer, _masked, _split

PROMPTS = make_prompts(24)
HELDOUT = make_prompts(9, prefix="h")
TASK = make_task(SortingTaskConfig(num_prompts=24), lambda text: [1])
DIGITS, HELDOUT_DIGITS = TASK.load(0, 9, print)
GROUP = 4
AUGMENT = {"per_step": 3, "template": "{question}={beginning}", "pattern": "([0-9]+)", "reach": 0.5}
EAGER = {"exploration": 0.0, "cooldown_steps": 0}
VOTE = {"kind": "vote", "answer_pattern": "([0-9])", "threshold": 0.1}


def make_config(**sections: dict[str, Any]) -> Config:
    tree: dict[str, Any] = {
        "model": {"path": "none"},
        "task": {"kind": "sorting"},
        "train": {"steps": 4, "prompts_per_step": 4, "group_size": GROUP, "checkpoint_every": 2},
        "eval": {"every": 2, "num_prompts": 5, "final_num_prompts": 9, "num_samples": 2},
        "learner": {"minibatches": 2},
        "rollout": {"sampling": {"temperature": 0.8, "max_new_tokens": 8}},
        "tracking": {"table_every": 3},
    }
    for name, section in sections.items():
        tree[name] = tree.get(name, {}) | section
    return validate(tree, "test")


class Run:
    """A trainer and the fakes around it; continues from the last checkpoint in `directory`."""

    def __init__(
        self,
        directory: Path,
        config: Config,
        engines: list[FakeEngine] | None = None,
        rewards: FakeRewards | None = None,
        exact: bool = True,
        kill_after: int | None = None,
    ) -> None:
        self.fuse = Fuse(kill_after)
        self.learner, self.fleet, self.tracker = FakeLearner(), FakeFleet(engines), FakeTracker()
        prompts, heldout = (DIGITS, HELDOUT_DIGITS) if config.pool.augment.per_step else (PROMPTS, HELDOUT)
        self.pool = make_pool(prompts, config.pool, seed=1)
        self.augmenter = make_augmenter(config, TASK, self.pool, prompts, heldout)
        checkpoints = CheckpointStore(directory, config.train.keep_checkpoints)
        guard = self.fuse.guard
        self.trainer = Trainer(
            config,
            guard(self.learner),
            guard(self.fleet),
            guard(rewards or FakeRewards()),
            guard(self.pool),
            guard(self.tracker),
            heldout,
            checkpoints,
            exact,
            self.augmenter,
        )
        if saved := checkpoints.latest():
            self.trainer.resume(*saved)

    def steps(self, key: str) -> list[int]:
        """Steps whose metrics hold `key`."""
        return [step for step, metrics in self.tracker.rows if key in metrics]

    def values(self, key: str) -> list[float]:
        return [metrics[key] for _, metrics in self.tracker.rows if key in metrics]

    def state(self) -> dict[str, Any]:
        """All that must not depend on interruptions."""
        progress = {k: v for k, v in vars(self.trainer.progress).items() if k not in ("train_seconds", "exact_steps")}
        augment = self.augmenter.state_dict() if self.augmenter else {}
        return {"theta": self.learner.theta, "pool": self.pool.state_dict(), "progress": progress, "augment": augment}


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
    assert {f"eval/{name}": value for name, value in final.items()} == run.tracker.rows[-1][1]
    assert run.trainer.progress.eval_before["pass@1"] == run.values("eval/pass@1")[0]
    assert run.tracker.tables == [(3, 4 * GROUP, "samples")]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000004", "step_000005"]


def test_the_last_step_is_evaluated_once(tmp_path: Path) -> None:
    run = Run(tmp_path, make_config(train={"steps": 4}))
    run.trainer.run()
    assert run.steps("eval/pass@1") == [0, 2, 4]


def test_metrics_of_a_step(tmp_path: Path) -> None:
    run = Run(tmp_path, make_config(), rewards=FakeRewards(lambda sample: float(sample.worker)))
    run.trainer.run()
    assert run.steps("timing_s/step") == [1, 2, 3, 4]
    for name in ("pool", "sample", "reward", "prox", "update", "publish"):
        assert run.steps(f"timing_s/{name}") == [1, 2, 3, 4]
    assert all(value > 0 for value in run.values("perf/tokens_per_s") + run.values("perf/sample_tokens_per_s"))
    # Two workers by turns: half of each group is right.
    assert run.values("reward/mean") == [0.5] * 4
    assert run.values("reward/std") == [0.5] * 4
    assert run.values("reward/informative_groups") == [1.0] * 4
    assert run.values("reward/faults") == [0.0] * 4
    assert run.values("mismatch/logp_abs_max") == [0.0] * 4
    assert run.values("mismatch/probe_logp_abs_max") == [0.0] * 4
    assert run.values("pool/in_flight") == [0.0] * 4
    assert run.values("actor/updates") == [2.0] * 4


# --- what is learned from --------------------------------------------------------------------------------------------


def right_half(sample: Sample) -> float:
    """Only prompts with an odd number tell anything: half of their responses are right."""
    return float(sample.worker) if int(sample.prompt.id[1:]) % 2 else 1.0


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


def advantages_of(run: Run) -> list[float]:
    return [s.advantage for update in run.learner.minibatches for m in update for s in m]


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
    proxes = [p for call in run.learner.prox for batch in call for p in batch]
    assert len(learnt) == len(proxes)
    partly = 0
    for sequence, prox in zip(learnt, proxes, strict=True):
        assert sequence.loss_mask_T is not None
        kept = [sequence.response_ids.count(token) == 1 for token in sequence.response_ids]
        assert sequence.loss_mask_T.tolist() == kept
        assert sequence.loss_tokens == sum(kept) > 0
        assert len(prox) == len(sequence.response_ids)
        partly += not all(kept)
    assert partly
    everything = {"mode": "mask", "probability": 1.0, "probability_run": 1}
    nothing_left = Run(tmp_path / "all", make_config(error_tokens=everything))
    nothing_left.trainer.run()
    assert nothing_left.learner.minibatches == []
    assert nothing_left.values("error_tokens/share") == [1.0] * 4


def test_an_empty_response_is_not_taken_for_a_masked_one() -> None:
    none = np.zeros(0, np.float32)
    assert not _masked(TrainSequence((1,), (), none, loss_mask_T=none.astype(bool)))
    assert _masked(TrainSequence((1,), (2,), none, loss_mask_T=np.array([False])))
    assert not _masked(TrainSequence((1,), (2,), none))


def test_divergence_names_the_sequence_and_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path, make_config(train={"steps": 1}))

    def diverge(minibatches: Sequence[Sequence[TrainSequence]], _: Any) -> dict[str, float]:
        raise DivergenceError(f"NaN in {[s.id for m in minibatches for s in m][:GROUP]}", mend="stop")

    monkeypatch.setattr(run.learner, "update", diverge)
    with pytest.raises(DivergenceError, match=r"^step 1: NaN in \['(p\d+)#0', '\1#1', '\1#2', '\1#3'\]; stop$"):
        run.trainer.run()


def test_a_group_has_one_score_a_response() -> None:
    sample = FakeEngine().generate([SampleRequest(PROMPTS[3], 0, 1.0, 4)])[0]
    with pytest.raises(RolloutError, match=r"1 scores for 2 responses to prompts \{'p3'\}"):
        Group([sample, sample], [Score(1.0)])


def test_the_estimator_is_the_configs(tmp_path: Path) -> None:
    section = {"estimator": "batch", "drop_zero_variance": False}
    run = Run(tmp_path, make_config(advantage=section, train={"steps": 1}))
    run.trainer.run()
    found = np.array(advantages_of(run))
    assert len(found) == 4 * GROUP
    assert len({round(a, 9) for a in found}) == 2  # one mean and one scale for all groups, where rewards are 0 and 1
    assert (found.mean(), found.std()) == (pytest.approx(0, abs=1e-9), pytest.approx(1, rel=1e-4))


def test_overlong_responses_of_equal_reward_differ(tmp_path: Path) -> None:
    def equal() -> FakeRewards:
        return FakeRewards(lambda _: 1.0)

    assert not advantages_of(ran(tmp_path / "off", make_config(), equal()))
    shaped = advantages_of(ran(tmp_path / "on", make_config(advantage={"overlong_cache": 8}), equal()))
    assert any(advantage != 0 for advantage in shaped)


def ran(directory: Path, config: Config, rewards: FakeRewards) -> Run:
    run = Run(directory, config, rewards=rewards)
    run.trainer.run()
    return run


def test_a_step_without_prompts_goes_on(tmp_path: Path) -> None:
    run = Run(tmp_path, make_config(train={"prompts_per_step": 24}, pool={"cooldown_steps": 2}))
    run.trainer.run()
    training = [requests for requests in run.fleet.requests if not requests or requests[0].prompt in PROMPTS]
    assert [len(requests) // GROUP for requests in training] == [24, 0, 0, 24]  # all rest, then all come back
    assert run.steps("reward/mean") == [1, 4]
    assert run.steps("timing_s/step") == [1, 2, 3, 4]
    assert run.trainer.progress.rollouts == 2 * 24 * GROUP


def test_dynamic_sampling_replaces_groups_that_tell_nothing(tmp_path: Path) -> None:
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


def test_augmentation_is_asked_with_the_rollouts_and_trained_on(tmp_path: Path) -> None:
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


@given(st.lists(st.integers(), min_size=1, max_size=40), st.integers(1, 50))
def test_split_keeps_order_and_balance(items: list[int], parts: int) -> None:
    split = _split(items, parts)
    assert [item for part in split for item in part] == items
    assert len(split) == min(parts, len(items))
    sizes = Counter(map(len, split))
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) > 0


# --- weights and mismatch --------------------------------------------------------------------------------------------


class OneBehind(FakeEngine):
    """Says that it has version v-1 after it was given v."""

    def load(self, weights: PublishedWeights) -> None:
        super().load(replace(weights, manifest=replace(weights.manifest, version=max(0, weights.manifest.version - 1))))


def test_samples_of_old_weights_stop_the_run(tmp_path: Path) -> None:
    run = Run(tmp_path, make_config(), engines=[FakeEngine(0), OneBehind(1)])
    with pytest.raises(PublicationError, match=r"samples of weight versions \[0\] at version 1"):
        run.trainer.run()
    assert run.steps("timing_s/step") == [1]


@pytest.mark.parametrize(("drift", "exact"), [(1.5, False), (float("nan"), True), (float("nan"), False)])
def test_a_probe_that_differs_stops_the_run_and_names_the_worker(tmp_path: Path, drift: float, exact: bool) -> None:
    run = Run(tmp_path, make_config(), engines=[FakeEngine(0), FakeEngine(1, drift)], exact=exact)
    with pytest.raises(PublicationError, match="does not compute what was published") as caught:
        run.trainer.run()
    assert caught.value.where == "rollout worker 1, weights version 0"
    assert run.tracker.rows == []


class LaterDrift(FakeEngine):
    """Computes something else from version 2 on: weights that did not take."""

    def load(self, weights: PublishedWeights) -> None:
        super().load(weights)
        self.drift = 1e-6 if weights.manifest.version >= 2 else 0.0


def test_where_zero_was_proven_any_later_mismatch_stops_the_run(tmp_path: Path) -> None:
    run = Run(tmp_path, make_config(), engines=[FakeEngine(0), LaterDrift(1)], exact=True)
    with pytest.raises(PublicationError, match="does not compute what was published") as caught:
        run.trainer.run()
    assert caught.value.where == "rollout worker 1, weights version 2"


def test_a_host_that_never_reaches_zero_says_so_and_goes_on(tmp_path: Path) -> None:
    run = Run(tmp_path, make_config(), engines=[FakeEngine(0), FakeEngine(1, drift=1e-3)], exact=True)
    run.trainer.run()
    (note,) = run.tracker.notes
    assert note.startswith("this host does not reach zero mismatch")


def test_a_replaced_worker_is_proven_before_its_samples_are_used(tmp_path: Path) -> None:
    run = Run(tmp_path, make_config())
    sample = run.fleet.sample

    def replacing(requests: Sequence[SampleRequest]) -> list[Sample]:
        run.fleet.replacements += run.trainer.progress.step == 1
        return sample(requests)

    run.fleet.sample = replacing  # type: ignore[method-assign]
    run.trainer.run()
    assert [weights.manifest.version for weights in run.fleet.loads] == [0, 1, 1, 2, 3, 4]


def test_a_probe_may_differ_within_the_bound_where_numerics_are_not_exact(tmp_path: Path) -> None:
    run = Run(tmp_path, make_config(), engines=[FakeEngine(0), FakeEngine(1, drift=0.1)], exact=False)
    run.trainer.run()
    assert run.values("mismatch/probe_logp_abs_max") == pytest.approx([0.1] * 4, abs=1e-5)
    assert run.values("mismatch/logp_abs_max") == pytest.approx([0.1] * 4, abs=1e-5)


def test_the_naive_baseline_is_not_held_to_the_probe(tmp_path: Path) -> None:
    config = make_config(learner={"aligned": False})
    run = Run(tmp_path, config, engines=[FakeEngine(0, drift=3.0)], exact=False)
    run.trainer.run()
    assert run.values("mismatch/probe_logp_abs_max") == pytest.approx([3.0] * 4, abs=1e-5)


@pytest.mark.parametrize("drift", [0.01, -0.01, float("nan")])
def test_mismatch_above_the_bound_stops_the_run(tmp_path: Path, drift: float) -> None:
    class FromVersion1(FakeEngine):
        def generate(self, requests: list[SampleRequest]) -> list[Sample]:  # type: ignore[override]
            in_training = requests[0].prompt in PROMPTS
            self.drift = drift if self.version == 1 and in_training else 0.0
            return super().generate(requests)

    run = Run(tmp_path, make_config(mismatch={"stop_above": 1e-3}), engines=[FromVersion1(0)])
    with pytest.raises(MismatchError, match=r"mismatch\.stop_above=0\.001") as caught:
        run.trainer.run()
    assert caught.value.where == "step 2"
    assert len(run.learner.minibatches) == 1


def test_mismatch_at_the_bound_goes_on(tmp_path: Path) -> None:
    run = Run(tmp_path, make_config(mismatch={"stop_above": 0.5}), engines=[FakeEngine(0, drift=0.1)], exact=False)
    run.trainer.run()
    assert run.trainer.progress.step == 4


def test_a_warning_is_said_once_a_crossing(tmp_path: Path) -> None:
    class Wavering(FakeEngine):
        def generate(self, requests: list[SampleRequest]) -> list[Sample]:  # type: ignore[override]
            in_training = requests[0].prompt in PROMPTS
            drifts = {1: 0.1, 2: 0.1, 4: float("nan"), 5: 0.1}
            self.drift = drifts.get(self.version, 0.0) if in_training else 0.0
            return super().generate(requests)

    config = make_config(train={"steps": 7}, mismatch={"warn_above": 0.05})
    run = Run(tmp_path, config, engines=[Wavering(0)], exact=False)
    run.trainer.run()
    warnings = [note for note in run.tracker.notes if "warn_above" in note]
    assert [note.partition(":")[0] for note in warnings] == ["step 2", "step 5"]
    assert "max |d log p| 1.00e-01 is above mismatch.warn_above=0.05" in warnings[0]


def test_every_step_tells_of_tokens_sequences_and_quartiles(tmp_path: Path) -> None:
    config = make_config(mismatch={"token_bounds": [0.05, 0.5]})
    run = Run(tmp_path, config, engines=[FakeEngine(0, drift=0.1)], exact=False)
    run.trainer.run()
    for prefix in ("", "q1_", "q2_", "q3_", "q4_"):
        assert run.values(f"mismatch/{prefix}logp_abs_mean") == pytest.approx([0.1] * 4, abs=1e-5)
        assert run.values(f"mismatch/{prefix}seq_ratio_max") == pytest.approx([np.exp(-0.1)] * 4, abs=1e-5)
        assert run.values(f"mismatch/{prefix}logp_abs_above_0.05") == [1.0] * 4
        assert run.values(f"mismatch/{prefix}logp_abs_above_0.5") == [0.0] * 4
    assert all(0 < share < 1 for share in run.values("mismatch/ess"))  # responses differ in length


def test_the_unaligned_gap_is_measured_when_asked(tmp_path: Path) -> None:
    run = Run(tmp_path, make_config(mismatch={"unaligned_every": 2}))
    run.trainer.run()
    assert run.steps("mismatch/unaligned_logp_abs_max") == run.steps("timing_s/unaligned") == [2, 4]
    assert run.values("mismatch/unaligned_logp_abs_mean") == pytest.approx([0.5, 0.5], abs=1e-5)
    assert run.values("mismatch/logp_abs_max") == [0.0] * 4


# --- pi_prox ---------------------------------------------------------------------------------------------------------


class DriftsOnce(FakeEngine):
    """Reports slightly other log-probs under version 2."""

    def load(self, weights: PublishedWeights) -> None:
        super().load(weights)
        self.drift = 0.01 if weights.manifest.version == 2 else 0.0


@pytest.mark.parametrize(
    ("prox", "engine", "scored"),
    [
        ("sampler", FakeEngine, [1, 2, 3]),
        ("sampler", DriftsOnce, [1, 2, 3, 4, 5, 6]),  # step 3 breaks the proof; 4, 5 and 6 make it again
        ("recompute", FakeEngine, [1, 2, 3, 4, 5, 6, 7, 8]),
    ],
)
def test_the_samplers_logprobs_are_trusted_after_the_proof_only(
    tmp_path: Path, prox: str, engine: type[FakeEngine], scored: list[int]
) -> None:
    config = make_config(train={"steps": 8}, learner={"prox": prox, "minibatches": 2}, mismatch={"proof_steps": 3})
    run = Run(tmp_path, config, engines=[engine(0)], exact=False)
    run.trainer.run()
    assert run.steps("timing_s/prox") == run.steps("mismatch/logp_abs_max") == scored


@pytest.mark.parametrize("prox", ["recompute", "sampler"])
def test_prox_belongs_to_its_sequence(tmp_path: Path, prox: str) -> None:
    config = make_config(learner={"prox": prox, "minibatches": 2}, mismatch={"proof_steps": 1})
    run = Run(tmp_path, config, rewards=FakeRewards(right_half))
    run.trainer.run()
    assert run.learner.prox
    for update, prox_of_update in zip(run.learner.minibatches, run.learner.prox, strict=True):
        for minibatch, rows in zip(update, prox_of_update, strict=True):
            for sequence, row in zip(minibatch, rows, strict=True):
                np.testing.assert_array_equal(row, sequence.sampler_logprobs_T)


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
    config = make_config(train={"steps": 5}, learner={"prox": "sampler"}, mismatch={"proof_steps": 2}, **sections)
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
    saved = CheckpointStore(tmp_path, 2).latest()
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


# --- evaluation ------------------------------------------------------------------------------------------------------


def given_in_order(*rewards: float) -> FakeRewards:
    left = iter(rewards)
    return FakeRewards(lambda _: next(left))


def test_evaluation_by_hand() -> None:
    prompts = [replace(prompt, level=level) for prompt, level in zip(make_prompts(3), (2, 2, 3), strict=True)]
    rewards = given_in_order(1, 0, 0, 0, 0.5, 1, 1, 0, 1)
    result = evaluate(FakeFleet(), rewards, prompts, make_config())
    assert result == pytest.approx(
        {
            "pass@1": (0.5 + 0.0 + 0.75) / 3,
            "pass@2": (1 + 0 + 1) / 3,
            "greedy": 2 / 3,
            "level_02/pass@1": 0.25,
            "level_03/pass@1": 0.75,
        }
    )


def test_evaluation_of_one_level_without_greedy() -> None:
    prompts = [replace(prompt, level=7) for prompt in make_prompts(2)]
    config = make_config(eval={"greedy": False, "num_samples": 1})
    assert evaluate(FakeFleet(), given_in_order(1, 0), prompts, config) == {"pass@1": 0.5}


def test_evaluations_ask_for_the_same_samples_each_time() -> None:
    fleet, config = FakeFleet(), make_config()
    first, again = (evaluate(fleet, FakeRewards(), HELDOUT, config) for _ in range(2))
    assert first == again
    assert fleet.requests[0] == fleet.requests[1]
    sampled, greedy = fleet.requests[0][:18], fleet.requests[0][18:]
    assert {(r.temperature, r.max_new_tokens) for r in sampled} == {(1.0, 8)}
    assert {(r.temperature, r.max_new_tokens) for r in greedy} == {(0.0, 8)}
    assert [r.prompt for r in greedy] == HELDOUT
    assert len({r.seed for r in sampled}) == len(sampled)
    # The order of the prompts does not matter to a prompt's seeds.
    evaluate(fleet, FakeRewards(), HELDOUT[::-1], config)
    assert set(fleet.requests[2]) == set(fleet.requests[0])

"""The exactness proof: alone, and in runs among fakes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from qarl.errors import MismatchError, PublicationError
from qarl.mismatch import Logprobs
from qarl.protocols import Learner
from qarl.types import Sample, SampleRequest, TrainSequence
from qarl.weights.source import PublishedWeights
from tests.support.fakes import FakeEngine
from tests.support.runs import PROMPTS, Run, make_config
from trainer.proof import LEFT_ZERO, PROBE_TOKENS, SHORT_PROBE_TOKENS, ExactnessProof, Probe


class Proof(ExactnessProof):
    """A proof, and the lines that it logs, or alerts with."""

    def __init__(self, prox: str = "auto", aligned: bool = True, exact: bool = True) -> None:
        self.lines: list[str] = []
        self.alerts: list[tuple[str, str]] = []
        learner = {"prox": prox, "aligned": aligned}
        config = make_config(learner=learner, mismatch={"proof_steps": 2, "probe_bound": 0.5})
        super().__init__(config, exact, self.lines.append, lambda *alert: self.alerts.append(alert))

    def see(self, *gaps: float) -> bool:
        """Observe one step for each gap; returns whether the sampler is trusted then."""
        for step, gap in enumerate(gaps, 1):
            sampler = [np.full(3, -1.0, np.float32), np.full(2, -2.0, np.float32)]
            self.observe([logprobs_T + np.float32(gap) for logprobs_T in sampler], sampler, step)
        return self.trusts_sampler(1)


def test_trust_takes_exact_steps_in_a_row() -> None:
    for exact in (True, False):
        assert not Proof(exact=exact).see(0)
        assert Proof(exact=exact).see(0, 0)
        assert not Proof(exact=exact).see(0, 0, 1e-6)
        assert not Proof(exact=exact).see(0, 1e-6, 0)
        assert not Proof(exact=exact).see(0, float("nan"), 0)
        assert Proof(exact=exact).see(1e-6, 0, 0)
    assert not Proof(prox="recompute").see(0, 0, 0)


def test_a_mismatch_after_an_exact_step_is_an_alert_where_exactness_is_promised() -> None:
    proof = Proof()
    proof.see(1e-3, 0, 2e-3, 2e-3)
    assert proof.alerts == [(LEFT_ZERO, "step 3: the mismatch is no longer zero, max |d log p| 2.00e-03")]
    loose = Proof(exact=False)
    loose.see(0, 2e-3)
    assert loose.lines == loose.alerts == proof.lines == []


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("gap", [1e-6, float("nan")])
@pytest.mark.parametrize(
    ("prox", "ending"), [("auto", ": the sampler's log-probs are no longer trusted"), ("recompute", "")]
)
def test_the_end_of_a_proof_is_an_alert_whatever_is_promised(exact: bool, gap: float, prox: str, ending: str) -> None:
    """A host that promises nothing may prove it, too: its parity check or its first probe differed."""
    proof = Proof(prox=prox, exact=exact)
    proof.see(0, 0, gap)
    ((title, line),) = proof.alerts
    assert title == LEFT_ZERO
    assert line.startswith("step 3: the mismatch is no longer zero, max |d log p| ")
    assert line.endswith(("e-06" if gap < 1 else "nan") + ending)
    proof.see(gap)
    assert len(proof.alerts) == 1  # there is none to end


def test_a_probe_that_differs_does_not_silence_the_end_of_a_later_proof() -> None:
    proof = Proof()
    proof.probe({0: 0.25}, version=0)
    assert proof.see(0, 0)
    assert not proof.see(1e-6)
    assert len(proof.lines) == 1
    ((_, line),) = proof.alerts
    assert line.endswith("the sampler's log-probs are no longer trusted")


def test_a_reset_says_why_when_it_ends_trust() -> None:
    proof = Proof()
    proof.see(0)
    proof.reset("too early to matter")
    assert not proof.see(0)  # the count began again
    assert proof.see(0)
    assert proof.alerts == []
    proof.reset("step 9: a reason")
    assert not proof.trusts_sampler(1)
    assert proof.alerts == [(LEFT_ZERO, "step 9: a reason: the sampler's log-probs are no longer trusted")]


def test_the_first_probe_decides_whether_zero_is_reached() -> None:
    proof = Proof()
    proof.probe({0: 0.0, 1: 0.25}, version=0)
    (line,) = proof.lines
    assert line.startswith("this host does not reach zero mismatch (probe: max |d log p| 2.50e-01")
    proof.probe({0: 0.5}, version=1)  # at the bound
    with pytest.raises(PublicationError, match=r"at most 0\.5 expected") as caught:
        proof.probe({0: 0.0, 3: 0.51}, version=2)
    assert caught.value.where == "rollout worker 3, weights version 2"


def test_a_probe_after_an_exact_one_must_be_exact_until_a_restart() -> None:
    proof = Proof()
    proof.probe({0: 0.0}, version=0)
    with pytest.raises(PublicationError, match="at most 0 expected"):
        proof.probe({1: 1e-6}, version=0)
    assert proof.see(0, 0)
    proof.restart(exact=True)
    assert not proof.trusts_sampler(1)
    proof.probe({1: 1e-6}, version=0)
    assert len(proof.lines) == 1  # this scheme does not reach zero
    proof.restart(exact=False)
    proof.probe({1: 1e-6}, version=0)
    assert len(proof.lines) == 1


@pytest.mark.parametrize("exact", [True, False])
def test_nan_is_no_proof(exact: bool) -> None:
    with pytest.raises(PublicationError, match="nan"):
        Proof(exact=exact).probe({0: float("nan")}, version=0)


def test_an_unaligned_learner_has_no_bound() -> None:
    proof = Proof(aligned=False, exact=False)
    proof.probe({0: 9.0, 1: float("nan")}, version=0)
    assert proof.lines == []


class ScoringOnly(Learner):
    """A learner that gives every token -1 and counts what it has scored."""

    scored = 0

    def score(
        self, sequences: Sequence[TrainSequence], aligned: bool = True, version: int | None = None
    ) -> list[Logprobs]:
        self.scored += len(sequences)
        return [np.full(len(sequence.response_ids), -1.0, np.float32) for sequence in sequences]


def drawn(request: SampleRequest, gap: float, token: int = 5) -> Sample:
    logprobs_T = np.full(request.max_new_tokens, -1.0 + gap, np.float32)
    return Sample(request.prompt, (token,) * request.max_new_tokens, logprobs_T, "", "length", version=3, worker=0)


def test_a_probe_scores_equal_responses_once_and_each_worker_with_its_own_log_probs() -> None:
    learner = ScoringOnly()
    probe = Probe(make_config(), learner.score, PROMPTS, Proof(exact=False))
    requests = probe.requests(3)
    samples = {
        0: [drawn(request, gap=0.0) for request in requests],
        1: [drawn(request, gap=0.25) for request in requests],
        2: [drawn(request, gap=0.125, token=6) for request in requests],
    }
    assert probe.judge(samples, 3) == {0: 0.0, 1: 0.25, 2: 0.125}
    assert learner.scored == 2 * len(requests)


def test_once_the_learner_has_moved_on_a_new_worker_must_sample_as_the_others_did() -> None:
    learner = ScoringOnly()
    probe = Probe(make_config(), learner.score, PROMPTS, Proof(exact=True))
    requests = probe.requests(3)
    judged = [drawn(request, gap=0.0) for request in requests]
    assert probe.judge({0: judged}, 3) == {0: 0.0}
    probe.learner_moved_on, scored = True, learner.scored
    assert probe.judge({1: judged}, 3) == {1: 0.0}
    for other in (drawn(requests[0], gap=1e-6), drawn(requests[0], gap=0.0, token=6)):
        with pytest.raises(PublicationError, match="does not compute what was published"):
            probe.judge({1: [other, *judged[1:]]}, 3)
    assert learner.scored == scored


def test_a_probe_is_long_at_first_and_in_every_nth_publication() -> None:
    config = make_config(rollout={"read_back_every": 3, "sampling": {"max_new_tokens": 20}})
    probe = Probe(config, ScoringOnly().score, PROMPTS, Proof())
    lengths = [{request.max_new_tokens for request in probe.requests(version)} for version in (7, 8, 8, 9, 10, 11)]
    assert lengths == [{PROBE_TOKENS}, *3 * [{SHORT_PROBE_TOKENS}], {PROBE_TOKENS}, {SHORT_PROBE_TOKENS}]


# --- in runs ---------------------------------------------------------------------------------------------------------


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


def test_a_probe_may_differ_within_the_bound_where_numerics_are_not_exact(tmp_path: Path) -> None:
    config = make_config(mismatch={"stop_above": 0.5})
    run = Run(tmp_path, config, engines=[FakeEngine(0), FakeEngine(1, drift=0.1)], exact=False)
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


@pytest.mark.parametrize("drift", [0.0, 1e-6])
def test_a_replaced_worker_is_proven_before_its_samples_are_used(tmp_path: Path, drift: float) -> None:
    run = Run(tmp_path, make_config())
    sample = run.fleet.sample

    def replacing(requests: list[SampleRequest]) -> list[Sample]:
        if run.trainer.progress.step == 1:
            run.fleet.replace(FakeEngine(1, drift))
        return sample(requests)

    run.fleet.sample = replacing  # type: ignore[assignment, method-assign]
    if drift == 0:
        run.trainer.run()
        assert run.trainer.progress.step == 4
        return
    with pytest.raises(PublicationError, match="does not compute what was published") as caught:
        run.trainer.run()
    assert caught.value.where == "rollout worker 1, weights version 1"
    assert run.steps("timing_s/step") == [1]

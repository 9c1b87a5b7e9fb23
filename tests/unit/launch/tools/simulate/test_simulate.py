"""Simulated runs beside what they must take."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from random import Random
from statistics import fmean
from typing import Any

import pytest

from launch.tools.simulate.simulate import run
from qarl.errors import ConfigError
from qarl.types import Sample
from tests.support.simulation import GROUP, LENGTH, PROMPTS, RESPONSES, config, rates
from trainer.collect import Collector

TOKENS = RESPONSES * LENGTH


@pytest.mark.parametrize("steps", [1, 4])
def test_one_engine_and_a_learner_take_turns(steps: int) -> None:
    speed = rates(
        decode_s=lambda batch: 1.0 + 0.5 * batch, prefill_s=2.0, update_s=0.25, optimizer_s=3.0, publish_s=7.0
    )
    found = run(config(), speed, steps)
    # The probe is one prompt more in an engine and 10 tokens, at no cost in score; it begins with the prompt.
    sample, update = LENGTH * (1 + 0.5 * RESPONSES) + PROMPTS * 2.0, TOKENS * 0.25 + 2 * 3.0
    assert found.stages["sample"] == pytest.approx(sample)
    assert found.stages["update"] == pytest.approx(update)
    probe = 4 * 2.0 + 4 * (1 + 0.5 * 4)  # four prompts of four tokens
    assert found.stages["publish"] == pytest.approx(7.0 + probe)
    assert found.step_s == pytest.approx(sample + update + 7.0 + probe)
    assert found.responses_per_s == pytest.approx(RESPONSES / found.step_s)
    assert found.tokens_per_s == pytest.approx(TOKENS / found.step_s)
    assert found.ages == {0: 1.0}
    assert found.workers_idle == pytest.approx(1 - sample / found.step_s)
    assert found.learner_idle == pytest.approx((sample + 7.0 + probe) / found.step_s)


def test_requests_beyond_the_slots_wait() -> None:
    speed = rates(decode_s=lambda batch: 1.0, slots=RESPONSES // 2)
    assert run(config(), speed, steps=3).stages["sample"] == pytest.approx(2 * LENGTH)


@pytest.mark.parametrize(("workers", "share"), [(2, 0.5), (4, 0.25)])
def test_engines_and_ranks_divide_the_work(workers: int, share: float) -> None:
    speed = rates(decode_s=lambda batch: float(batch), update_s=1.0)
    found = run(config(workers=workers, ranks=workers), speed, steps=3)
    assert found.stages["sample"] == pytest.approx(share * RESPONSES * LENGTH)
    assert found.stages["update"] == pytest.approx(share * TOKENS)


def test_the_longest_response_bounds_a_step_in_turn_and_not_one_that_samples_ahead() -> None:
    lengths = [LENGTH] * 31 + [60]
    speed = rates(decode_s=lambda batch: 1.0, lengths=lengths, update_s=30.0 / TOKENS)
    in_turn, ahead = (run(config(n), speed, steps=12) for n in (0, 4))
    assert in_turn.workers_idle > ahead.workers_idle
    assert ahead.step_s < in_turn.step_s


def test_a_fast_fleet_leaves_the_learner_as_the_bound() -> None:
    speed = rates(decode_s=lambda batch: 1e-6, score_s=0.5, update_s=1.0, publish_s=3.0)
    found = run(config(max_staleness=1), speed, steps=6)
    assert found.step_s == pytest.approx(1.5 * TOKENS + 3.0 + 4 * 4 * 0.5, rel=1e-3)  # and the probe is scored
    assert found.learner_idle == pytest.approx(3.0 / found.step_s, abs=1e-4)  # the publication
    assert found.ages == {1: 1.0}


def test_a_fast_learner_leaves_the_fleet_as_the_bound() -> None:
    speed = rates(decode_s=lambda batch: 1.0, update_s=1e-6)
    found = run(config(max_staleness=1), speed, steps=6)
    assert found.step_s == pytest.approx(LENGTH + 4, rel=0.1)  # and the probe's four tokens
    assert found.stages["publish"] > 13  # waits for the groups that have begun


def test_one_machine_is_shared() -> None:
    """Two engines and a rank on two cores: all take half as long again while all are at work."""
    speed = rates(decode_s=lambda batch: 20.0, update_s=LENGTH * 20.0 / TOKENS)
    apart = run(config(1, workers=2), speed, steps=6)
    shared = run(config(1, workers=2), speed, steps=6, processors=2)
    assert apart.stages["update"] == pytest.approx(LENGTH * 20.0)
    assert shared.stages["update"] == pytest.approx(1.5 * LENGTH * 20.0, rel=0.01)
    in_turn = run(config(0, workers=2), speed, steps=6, processors=2)
    assert in_turn.stages["update"] == pytest.approx(LENGTH * 20.0)


@pytest.mark.parametrize("max_staleness", range(6))
def test_nothing_is_older_than_the_bound(max_staleness: int) -> None:
    lengths = [round(math.exp(Random(n).gauss(2, 1))) + 1 for n in range(200)]
    speed = rates(decode_s=lambda batch: 0.1, lengths=lengths, update_s=1.0 / TOKENS, publish_s=0.2)
    settings = {"rollout": {"stragglers": {"kind": "keep"}}} if max_staleness else {}
    found = run(config(max_staleness, workers=3, **settings), speed, steps=15)
    assert max(found.ages) <= max_staleness
    assert sum(found.ages.values()) == pytest.approx(1)
    assert run(config(max_staleness, workers=3, **settings), speed, steps=15) == found


def test_the_versions_of_a_group_are_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a step with thousands of groups in flight takes minutes of the driver."""
    looked: list[Sample] = []
    monkeypatch.setattr(Collector, "_check_versions", lambda self, samples, version: looked.append(samples[0]))
    run(config(4), rates(decode_s=lambda batch: 1.0, update_s=1.0), steps=6)
    assert looked
    assert len(looked) == len(set(map(id, looked)))


def test_stragglers_go_back_to_the_pool() -> None:
    speed = rates(decode_s=lambda batch: 1.0, lengths=[1] * 100 + [60])
    stragglers = {"kind": "return", "after_s": 5.0}
    found = run(config(rollout={"num_workers": 1, "stragglers": stragglers}), speed, steps=10)
    assert found.given_back > 0
    assert found.stages["sample"] < 6


def test_uninformative_groups_are_not_learned_from() -> None:
    speed = rates(update_s=1.0, informative=0.5)
    dropping = config(advantage={"drop_zero_variance": True}, train={"prompts_per_step": 64})
    found = run(dropping, speed, steps=8)
    assert found.stages["update"] == pytest.approx(32 * GROUP * LENGTH, rel=0.2)


def test_a_token_may_stand_for_several() -> None:
    speed = rates(decode_s=lambda batch: 8.0, lengths=[8], token=8)
    found = run(config(), speed, steps=2)
    assert found.tokens_per_s == pytest.approx(RESPONSES * 64 / found.step_s)
    assert fmean(found.stages.values()) > 0


@pytest.mark.parametrize("max_staleness", [0, 1])
def test_nothing_hides_the_drivers_own_work(max_staleness: int) -> None:
    speed = rates(update_s=1.0)
    found, slower = (run(config(max_staleness), replace(speed, driver_s=s), steps=4) for s in (0.0, 1.0))
    assert slower.step_s == pytest.approx(found.step_s + RESPONSES)


def test_the_unaligned_forward_takes_its_own_time() -> None:
    settings = {"mismatch": {"unaligned_every": 2, "unaligned_sequences": 3}}
    found = run(config(**settings), rates(score_s=0.01, unaligned_s=2.0), steps=4)
    assert found.stages["unaligned"] == pytest.approx(3 * LENGTH * 2.0)


def test_partial_rollouts_let_weights_in_at_once() -> None:
    """A publication waits for nothing, and the learner computes what each version sampled with all before it."""
    speed = rates(decode_s=lambda batch: 1.0, lengths=[60], update_s=0.5 / RESPONSES, publish_s=2.0)
    micro = {"learner": {"num_ranks": 1, "minibatches": 2, "max_tokens_per_micro_batch": 10**5}}
    waiting = run(config(1, **micro), speed, steps=9)
    partial = run(config(1, rollout={"partial": True, "max_num_seqs": 1000}, **micro), speed, steps=9)
    assert waiting.stages["publish"] > 20
    assert partial.stages["publish"] == pytest.approx(2.0 + 4, rel=0.01)
    assert partial.step_s < waiting.step_s
    assert partial.stages["update"] > 1.2 * waiting.stages["update"]
    assert max(partial.ages) == 1


@pytest.mark.parametrize(
    ("key", "sections"),
    [
        ("environment.kind", {"environment": {"kind": "guess"}, "learner": {"max_tokens_per_micro_batch": 10**5}}),
        ("rollout.tensor_parallel_size", {"rollout": {"scheme": "none", "tensor_parallel_size": 2}}),
    ],
)
def test_what_is_not_simulated_is_refused(key: str, sections: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{re.escape(key)}: is not simulated"):
        run(config(**sections), rates(), steps=1)

"""The batch of one step: records and minibatches."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qarl.config.run import Config
from qarl.error_tokens import ErrorTokens, find_error_tokens
from qarl.types import Sample, SampleRequest, Score, TrainSequence
from tests.support.fakes import FakeEngine, make_prompts
from tests.support.records import record_of, row_of
from tests.support.runs import GROUP, Run, advantages_of, make_config
from trainer.collect import Group
from trainer.step import (
    Record,
    at_sampled,
    build,
    error_tokens_of,
    evenly,
    fully_masked,
    split,
    table_row,
    with_prox,
    without_error_tokens,
)

LONG = {"learner": {"max_tokens_per_micro_batch": 9 * 1024}}
REWARDS = st.lists(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=2, max_size=5), max_size=8)


def records_of(rewards_PG: list[list[float]], config: Config | None = None) -> list[Record]:
    engine, prompts = FakeEngine(), make_prompts(len(rewards_PG))
    engine.version = 7
    groups = []
    for prompt, rewards_G in zip(prompts, rewards_PG, strict=True):
        requests = [SampleRequest(prompt, seed, 1.0, 4) for seed in range(len(rewards_G))]
        groups.append(Group(engine.generate(requests), [Score(reward) for reward in rewards_G]))
    return build(groups, config or make_config())


@given(REWARDS)
def test_build_gives_each_response_one_record(rewards_PG: list[list[float]]) -> None:
    records = records_of(rewards_PG)
    assert [r.score.reward for r in records] == [reward for rewards_G in rewards_PG for reward in rewards_G]
    numbers = [(group, i) for group, rewards_G in enumerate(rewards_PG) for i in range(len(rewards_G))]
    assert [(record.group, record.sequence.id) for record in records] == [(g, f"p{g}#{i}") for g, i in numbers]
    for record in records:
        rewards_G = rewards_PG[record.group]
        assert record.used == (len(set(rewards_G)) > 1)
        expected = (record.score.reward - np.mean(rewards_G)) / (np.std(rewards_G) + 1e-6)
        assert record.sequence.advantage == pytest.approx(expected, abs=1e-6)
        sample, sequence = record.sample, record.sequence
        assert (sequence.prompt_ids, sequence.response_ids) == (sample.prompt.token_ids, sample.response_ids)
        assert sequence.sampler_logprobs_T is sample.logprobs_T
        assert (sequence.version, sequence.prox_logprobs_T, sequence.loss_mask_T) == (7, None, None)


def test_groups_of_equal_rewards_are_used_when_they_are_not_dropped() -> None:
    config = make_config(advantage={"drop_zero_variance": False})
    assert [record.used for record in records_of([[1, 1], [0, 1]])] == [False, False, True, True]
    assert all(record.used for record in records_of([[1, 1], [0, 1]], config))


def test_prox_is_one_row_a_record() -> None:
    records = records_of([[0, 1], [1, 0]])
    prox = [np.full(len(record.sequence.response_ids), -i, np.float32) for i, record in enumerate(records)]
    for record, before, prox_T in zip(with_prox(records, prox), records, prox, strict=True):
        assert record.sequence.prox_logprobs_T is prox_T
        assert (record.sequence.id, record.sample) == (before.sequence.id, before.sample)
    with pytest.raises(ValueError, match="shorter"):
        with_prox(records, prox[:3])


def mask(records: list[Record], masked: list[bool]) -> list[Record]:
    """The records, each with every token masked or none."""
    config = make_config(error_tokens={"probability": 1.0, "probability_run": 1}).error_tokens
    found = []
    for record, every in zip(records, masked, strict=True):
        ids = record.sample.response_ids
        found.append(find_error_tokens(ids, "", np.full(len(ids), -9.0 if every else 0.0, np.float32), config))
    return without_error_tokens(records, found)


@given(REWARDS, st.integers(1, 10), st.integers(0, 9), st.data())
def test_split_keeps_groups_whole_and_leaves_out_what_is_not_used(
    rewards_PG: list[list[float]], count: int, seed: int, data: st.DataObject
) -> None:
    records = records_of(rewards_PG)
    masked = data.draw(st.lists(st.booleans(), min_size=len(records), max_size=len(records)))
    records = mask(records, masked)
    minibatches = split(records, count, seed)
    group_of: dict[str, int] = {record.sequence.id: record.group for record in records}
    kept = [r.sequence.id for r, out in zip(records, masked, strict=True) if r.used and not out]
    ids: list[list[str]] = [[sequence.id for sequence in minibatch] for minibatch in minibatches]
    assert sorted(kept) == sorted(id for minibatch in ids for id in minibatch)
    assert len(minibatches) <= count
    assert all(ids)
    groups: list[set[int]] = [{group_of[id] for id in minibatch} for minibatch in ids]
    assert sum(map(len, groups)) == len({group_of[id] for id in kept})
    for minibatch in ids:  # group by group
        assert [group for group, _ in groupby(map(group_of.get, minibatch))] == list(
            dict.fromkeys(map(group_of.get, minibatch))
        )
    again = split(records, count, seed)
    assert ids == [[sequence.id for sequence in minibatch] for minibatch in again]


def test_an_empty_response_is_not_taken_for_a_masked_one() -> None:
    none = np.zeros(0, np.float32)
    assert not fully_masked(TrainSequence((1,), (), none, loss_mask_T=none.astype(bool)))
    assert fully_masked(TrainSequence((1,), (2,), none, loss_mask_T=np.array([False])))
    assert not fully_masked(TrainSequence((1,), (2,), none))


@given(st.lists(st.integers(), min_size=1, max_size=40), st.integers(1, 50))
def test_evenly_keeps_order_and_balance(items: list[int], parts: int) -> None:
    split = evenly(items, parts)
    assert [item for part in split for item in part] == items
    assert len(split) == min(parts, len(items))
    sizes = Counter(map(len, split))
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) > 0


def test_given_tokens_count_nowhere() -> None:
    """A conversation: three sampled tokens, two given ones, four sampled ones, of which three repeat themselves."""
    sampled_T = np.array([True] * 3 + [False] * 2 + [True] * 4)
    logprobs_T = np.where(sampled_T, np.float32(-0.5), np.float32(0.0))
    sample = Sample(make_prompts(1)[0], (1, 2, 3, 9, 9, 7, 7, 7, 4), logprobs_T, "text", "stop", 0, sampled_T=sampled_T)
    config = make_config()
    (record, _) = build([Group([sample, sample], [Score(1.0), Score(0.0)])], config)
    (record,) = with_prox([record], [logprobs_T])
    assert record.sequence.loss_tokens == 7
    assert at_sampled([record], [np.arange(9)])[0].tolist() == [0, 1, 2, 5, 6, 7, 8]
    assert row_of(sample, Score(1.0))["mean_logprob"] == -0.5
    detectors = config.error_tokens.model_copy(update={"ngram": 1, "ngram_count": 3})
    found = error_tokens_of([record], detectors)
    assert found[0].repeated_T.tolist() == [False] * 3 + [True] * 3 + [False]
    (masked,) = without_error_tokens([record], found)
    assert masked.sequence.counted_T.tolist() == [True] * 3 + [False] * 5 + [True]


def test_the_estimator_is_the_configs(tmp_path: Path) -> None:
    section = {"estimator": "batch", "drop_zero_variance": False}
    run = Run(tmp_path, make_config(advantage=section, train={"steps": 1}))
    run.trainer.run()
    found = np.array(advantages_of(run))
    assert len(found) == 4 * GROUP
    assert len({round(a, 9) for a in found}) == 2  # one mean and one scale for all groups, where rewards are 0 and 1
    assert (found.mean(), found.std()) == (pytest.approx(0, abs=1e-9), pytest.approx(1, rel=1e-4))


def test_a_table_row_shows_what_the_update_did_to_each_token() -> None:
    """Of four tokens the second was given; the policy's last token is an error token."""
    sampled_T = np.array([True, False, True, True])
    logprobs_T = np.array([-1.0, 0.0, -2.0, -0.5], np.float32)
    sample = Sample(make_prompts(1)[0], (5, 9, 6, 7), logprobs_T, "text", "stop", 3, sampled_T=sampled_T)
    record = record_of(sample, Score(1.0), advantage=0.25)
    prox_T = logprobs_T + np.array([0.0, 0.0, 0.125, 0.0], np.float32)
    record = replace(record, sequence=replace(record.sequence, prox_logprobs_T=prox_T))
    none = np.zeros(3, bool)
    found = ErrorTokens(none, none, np.array([False, False, True]))
    after_T = prox_T + np.array([math.log(2), 0.0, math.log(4), 0.0], np.float32)
    row = table_row(record, found, 4, make_config(), after_T)
    assert row["mismatch"] == 0.125
    assert "staleness" not in row
    assert row["ratio"] == pytest.approx(2.0)
    assert row["token_ratios"] == pytest.approx([2.0, 1.0, 4.0, 1.0])
    assert row["token_errors"] == [0, 0, 0, 1]
    assert row["token_logprobs"] == [-1.0, 0.0, -2.0, -0.5]
    assert (row["advantage"], row["version"], row["error_tokens"]) == (0.25, 3, "improbable 2-2")


@pytest.mark.parametrize(
    ("step", "keep_kv", "expected"),
    [(4, False, (0.125, 2.0)), (4, True, (math.nan, 2.0)), (3, False, (2.0, 0.125)), (5, False, (math.nan, 2.0))],
)
def test_only_tokens_of_the_learners_own_weights_show_mismatch(
    step: int, keep_kv: bool, expected: tuple[float, float]
) -> None:
    """Of four tokens one was given, one is of version 2, and two of 3, which those of `keep_kv` cannot compare."""
    sampled_T, versions_T = np.array([True, False, True, True]), np.array([2, 2, 3, 3])
    logprobs_T = np.array([-1.0, 0.0, -2.0, -0.5], np.float32)
    prompt = make_prompts(1)[0]
    sample = Sample(prompt, (5, 9, 6, 7), logprobs_T, "text", "stop", 3, sampled_T=sampled_T, versions_T=versions_T)
    record = record_of(sample, Score(1.0))
    gap_T = np.array([2.0, 9.0, 0.0, -0.125], np.float32)
    record = replace(record, sequence=replace(record.sequence, prox_logprobs_T=logprobs_T + gap_T))
    config = make_config(train={"max_staleness": 2}, **LONG, rollout={"partial": True, "keep_kv": keep_kv})
    row = table_row(record, None, step, config)
    assert (row["mismatch"], row["staleness"]) == pytest.approx(expected, nan_ok=True)

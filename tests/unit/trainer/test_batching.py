"""A batch loses no token, positions point at the tokens that predict the response, and micro-batches fit."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import groupby

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qarl.numerics.flat import FlatLayout
from qarl.types import TrainSequence
from trainer.batching import Batch, micro_batches, pad

CPU = torch.device("cpu")
IDS = st.lists(st.integers(1, 99), min_size=1, max_size=7).map(tuple)
PROMPTS = st.sampled_from([(1,), (2, 3), (4, 5, 6, 7), (8, 9, 10)])
"""Few: neighbours often have the same one."""
SEQUENCES = st.lists(
    st.builds(
        lambda prompt, response: TrainSequence(prompt, response, -np.array(response, np.float32)),
        prompt=PROMPTS,
        response=IDS,
    ),
    min_size=1,
    max_size=8,
)


@given(SEQUENCES)
def test_a_flat_batch_is_each_prompt_and_its_responses(sequences: list[TrainSequence]) -> None:
    batch = Batch.of(sequences, CPU)
    expected: list[int] = []
    for prompt, group in groupby(sequences, key=lambda s: s.prompt_ids):
        expected += prompt
        for sequence in group:
            expected += sequence.response_ids[:-1]
    assert batch.ids_N.tolist() == expected
    for row, sequence in zip(batch.rows, sequences, strict=True):
        assert batch.ids_N[row.tokens()].tolist() == [*sequence.prompt_ids, *sequence.response_ids[:-1]]
    lengths = [len(s.response_ids) for s in sequences]
    assert batch.mask_BT.tolist() == [[t < n for t in range(max(lengths))] for n in lengths]


@given(SEQUENCES)
def test_each_response_token_follows_the_token_that_predicts_it(sequences: list[TrainSequence]) -> None:
    batch = Batch.of(sequences, CPU)
    assert batch.sampled_S.tolist() == [t for s in sequences for t in s.response_ids]
    before = [t for s in sequences for t in (s.prompt_ids + s.response_ids)[len(s.prompt_ids) - 1 : -1]]
    assert batch.ids_N[batch.predicts_S].tolist() == before
    ids_BL, mask_BL = batch.padded()
    assert ids_BL[batch.predicts_BL()].tolist() == before
    for row, sequence in enumerate(sequences):
        assert ids_BL[row, mask_BL[row]].tolist() == [*sequence.prompt_ids, *sequence.response_ids]
    assert not ids_BL[~mask_BL].any()


def conversation(prompt: tuple[int, ...], *turns: tuple[int, ...]) -> TrainSequence:
    """Turns that were sampled and given alternate, a sampled one first."""
    response = tuple(token for turn in turns for token in turn)
    sampled = [number % 2 == 0 for number, turn in enumerate(turns) for _ in turn]
    return TrainSequence(prompt, response, -np.array(response, np.float32), sampled_T=np.array(sampled))


def partial_response(prompt: tuple[int, ...], *segments: tuple[int, ...]) -> TrainSequence:
    """Each segment is of the version after the one before it."""
    response = tuple(token for segment in segments for token in segment)
    versions = [4 + number for number, segment in enumerate(segments) for _ in segment]
    return TrainSequence(prompt, response, -np.array(response, np.float32), versions_T=np.array(versions))


CONVERSATIONS = st.lists(
    st.builds(
        lambda kind, prompt, turns: kind(prompt, *turns),
        kind=st.sampled_from([conversation, partial_response]),
        prompt=PROMPTS,
        turns=st.lists(IDS, min_size=1, max_size=5),
    ),
    min_size=1,
    max_size=5,
)


@given(CONVERSATIONS)
def test_each_turn_is_a_row_whose_prompt_is_all_before_it(sequences: list[TrainSequence]) -> None:
    batch = Batch.of(sequences, CPU)
    turns = [(s, *turn) for s in sequences for turn in s.turns]
    turns.sort(key=lambda turn: turn[1] > 0)
    for row, (sequence, start, end) in zip(batch.rows, turns, strict=True):
        before = [*sequence.prompt_ids, *sequence.response_ids[:start]]
        assert batch.ids_N[row.tokens()].tolist() == [*before, *sequence.response_ids[start : end - 1]]
        assert row.prompt_len == len(before)
    own = [s.forward_tokens for s in sequences]
    prompts = sum(len(prompt) for prompt, _ in groupby(s.prompt_ids for s in sequences))
    assert len(batch.ids_N) <= prompts + sum(own) - len(batch.rows)  # equal later turns share, too


@given(CONVERSATIONS)
def test_sampled_tokens_of_a_conversation_follow_what_predicts_them(sequences: list[TrainSequence]) -> None:
    batch = Batch.of(sequences, CPU)
    pairs = [
        (before, token)
        for s in sequences
        for before, token, sampled in zip(
            (s.prompt_ids + s.response_ids)[len(s.prompt_ids) - 1 : -1], s.response_ids, s.counted_T, strict=True
        )
        if sampled
    ]
    assert list(zip(batch.ids_N[batch.predicts_S].tolist(), batch.sampled_S.tolist(), strict=True)) == pairs
    ids_BL, _ = batch.padded()
    assert ids_BL[batch.predicts_BL()].tolist() == [before for before, _ in pairs]
    assert batch.mask_BT.sum() == len(pairs)
    assert torch.equal(batch.mask_BT, batch.loss_mask_BT)


def test_the_loss_leaves_out_given_tokens_and_masked_ones() -> None:
    sequence = conversation((1, 2), (3, 4), (5,), (6, 7, 8))
    assert sequence.turns == [(0, 2), (3, 6)]
    assert sequence.loss_tokens == 5
    masked = replace(sequence, loss_mask_T=np.array([True, False, True, True, True, False]))
    assert masked.counted_T.tolist() == [True, False, False, True, True, False]
    batch = Batch.of([masked], CPU)
    assert batch.mask_BT.tolist() == [[True, True, False, True, True, True]]
    assert batch.loss_mask_BT.tolist() == [masked.counted_T.tolist()]


def test_the_tokens_of_a_version_are_a_turn_and_can_be_told_apart() -> None:
    sequence = partial_response((1, 2), (3, 4), (5,), (6, 7, 8))
    assert sequence.turns == [(0, 2), (2, 3), (3, 6)]
    assert sequence.forward_tokens == 2 + (2 + 3) + (2 + 6)
    assert [sequence.at_sampled(np.arange(6), version).tolist() for version in (4, 5, 6, 7)] == [
        [0, 1],
        [2],
        [3, 4, 5],
        [],
    ]
    both = replace(sequence, sampled_T=np.array([True, True, True, False, True, True]))
    assert both.turns == [(0, 2), (2, 3), (4, 6)]
    assert both.at_sampled(np.arange(6), 6).tolist() == [4, 5]
    of_one = TrainSequence((1,), (2, 3), np.zeros(2, np.float32), version=7)
    assert [of_one.at_sampled(np.arange(2), version).tolist() for version in (6, 7)] == [[], [0, 1]]


@given(SEQUENCES)
def test_a_layout_takes_values_to_padded_rows_and_back(sequences: list[TrainSequence]) -> None:
    batch = Batch.of(sequences, CPU)
    layout = FlatLayout(batch.rows)
    padded_RL = layout.pad(batch.ids_N)
    assert torch.equal(layout.flatten(padded_RL), batch.ids_N)
    for padded_L, row, sequence in zip(padded_RL, batch.rows, sequences, strict=True):
        ids = [*sequence.prompt_ids, *sequence.response_ids[:-1]]
        assert padded_L[: len(ids)].tolist() == ids
        assert layout.positions_N[row.tokens()].tolist() == list(range(len(ids)))


@given(SEQUENCES, st.randoms(use_true_random=False))
def test_the_loss_mask_is_within_the_response(sequences: list[TrainSequence], rng: random.Random) -> None:
    assert torch.equal((plain := Batch.of(sequences, CPU)).loss_mask_BT, plain.mask_BT)
    masks = [[rng.random() < 0.5 for _ in s.response_ids] for s in sequences]
    masked = [replace(s, loss_mask_T=np.array(m)) for s, m in zip(sequences, masks, strict=True)]
    batch = Batch.of(masked, CPU)
    assert torch.equal(batch.mask_BT, plain.mask_BT)
    assert batch.loss_mask_BT[batch.mask_BT].tolist() == [keep for mask in masks for keep in mask]
    assert not batch.loss_mask_BT[~batch.mask_BT].any()
    assert [s.loss_tokens for s in masked] == batch.loss_mask_BT.sum(1).tolist()
    assert [s.loss_tokens for s in sequences] == [len(s.response_ids) for s in sequences]


@given(SEQUENCES)
def test_padded_values_are_the_given_ones_under_the_mask(sequences: list[TrainSequence]) -> None:
    mask_BT = Batch.of(sequences, CPU).mask_BT
    values = [s.sampler_logprobs_T for s in sequences]
    padded_BT = pad(values, mask_BT)
    assert padded_BT.dtype == torch.float32
    assert padded_BT.shape == mask_BT.shape
    np.testing.assert_array_equal(padded_BT[mask_BT].numpy(), np.concatenate(values))
    assert not padded_BT[~mask_BT].any()


def test_padding_takes_read_only_arrays() -> None:
    """Ray hands out arrays that cannot be written to."""
    value = np.array([-1.0, -2.0], np.float32)
    value.flags.writeable = False
    padded_BT = pad([value], torch.ones(1, 3))
    padded_BT += 1
    assert padded_BT.tolist() == [[0.0, -1.0, 1.0]]
    assert value.tolist() == [-1.0, -2.0]


@given(st.tuples(SEQUENCES, st.integers(11, 40)) | st.tuples(CONVERSATIONS, st.integers(125, 200)), st.integers(1, 3))
def test_micro_batches_hold_every_sequence_once_and_their_budget(
    given: tuple[list[TrainSequence], int], ranks: int
) -> None:
    sequences, budget = given
    by_rank = micro_batches(sequences, budget, ranks)
    assert len(by_rank) == ranks
    assert len({len(batches) for batches in by_rank}) == 1
    flat = [batch for batches in by_rank for batch in batches]
    assert sorted(i for batch in flat for i in batch) == list(range(len(sequences)))
    for batch in filter(None, flat):
        # The budget counts the last token of each turn, which a flat batch leaves out.
        flat_batch = Batch.of([sequences[i] for i in batch], CPU)
        assert len(flat_batch.ids_N) + len(flat_batch.rows) <= budget


@given(st.tuples(SEQUENCES, st.integers(11, 40)) | st.tuples(CONVERSATIONS, st.integers(195, 400)), st.integers(1, 3))
def test_padded_micro_batches_hold_their_rows_in_the_budget(given: tuple[list[TrainSequence], int], ranks: int) -> None:
    sequences, budget = given
    flat = [batch for batches in micro_batches(sequences, budget, ranks, padded=True) for batch in batches]
    assert sorted(i for batch in flat for i in batch) == list(range(len(sequences)))
    for indices in filter(None, flat):
        batch = Batch.of([sequences[i] for i in indices], CPU)
        assert FlatLayout(batch.rows).pad(batch.ids_N).numel() <= budget
        assert batch.padded()[0].numel() <= budget


def test_a_long_response_does_not_lengthen_the_rows_of_short_ones() -> None:
    lengths = (2, 2, 2, 8, 2, 2)
    group = [TrainSequence((1, 2), (9,) * length, np.zeros(length, np.float32)) for length in lengths]
    assert micro_batches(group, 20) == [[[0, 1, 2, 3, 4, 5]]]  # flat, of one prompt
    assert micro_batches(group, 20, padded=True) == [[[3, 4], [0, 1, 2, 5]]]


def test_a_group_stays_together_and_ranks_share_the_work() -> None:
    groups = [TrainSequence((prompt,) * 4, (9,) * 6, np.zeros(6, np.float32)) for prompt in range(4) for _ in range(3)]
    assert micro_batches(groups, 1000) == [[list(range(12))]]
    assert micro_batches(groups, 22) == [[[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]]
    assert micro_batches(groups, 1000, 2) == [[[0, 1, 2, 6, 7, 8]], [[3, 4, 5, 9, 10, 11]]]
    assert micro_batches(groups[:3], 1000, 2) == [[[0, 2]], [[1]]]  # one group alone is divided
    assert micro_batches(groups[:1], 1000, 2) == [[[0]], [[]]]


def test_a_sequence_above_the_budget_is_an_error() -> None:
    with pytest.raises(ValueError, match="a sequence of 7 tokens exceeds 6 tokens a micro-batch"):
        micro_batches([TrainSequence((1, 2), (3,) * 5, np.zeros(5, np.float32))], 6)

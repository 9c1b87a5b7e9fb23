"""Padding loses nothing, and positions point at the tokens that predict the response."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from qarl.types import TrainSequence
from trainer.batching import PaddedBatch, micro_batches, pad

CPU = torch.device("cpu")
IDS = st.lists(st.integers(1, 99), min_size=1, max_size=7).map(tuple)
SEQUENCES = st.lists(
    st.builds(
        lambda prompt, response: TrainSequence(prompt, response, -np.array(response, np.float32)),
        prompt=IDS,
        response=IDS,
    ),
    min_size=1,
    max_size=5,
)


@given(SEQUENCES)
def test_a_batch_holds_every_token_once(sequences: list[TrainSequence]) -> None:
    batch = PaddedBatch.of(sequences, CPU)
    for row, sequence in enumerate(sequences):
        ids = [*sequence.prompt_ids, *sequence.response_ids]
        assert batch.input_ids_BL[row, : len(ids)].tolist() == ids
        assert not batch.input_ids_BL[row, len(ids) :].any()
        assert batch.seq_lens[row] == len(ids)
        assert batch.prompt_lens[row] == len(sequence.prompt_ids)
        assert batch.mask_BT[row].tolist() == [t < len(sequence.response_ids) for t in range(batch.mask_BT.shape[1])]
    assert batch.input_ids_BL.shape[1] == max(batch.seq_lens)


@given(SEQUENCES)
def test_each_response_token_follows_its_position(sequences: list[TrainSequence]) -> None:
    batch = PaddedBatch.of(sequences, CPU)
    row, column = batch.response_positions()
    assert batch.input_ids_BL[row, column + 1].tolist() == [t for s in sequences for t in s.response_ids]
    assert row.tolist() == [i for i, s in enumerate(sequences) for _ in s.response_ids]


@given(SEQUENCES, st.randoms(use_true_random=False))
def test_the_loss_mask_is_within_the_response(sequences: list[TrainSequence], rng: random.Random) -> None:
    assert torch.equal((plain := PaddedBatch.of(sequences, CPU)).loss_mask_BT, plain.mask_BT)
    masks = [[rng.random() < 0.5 for _ in s.response_ids] for s in sequences]
    masked = [replace(s, loss_mask_T=np.array(m)) for s, m in zip(sequences, masks, strict=True)]
    batch = PaddedBatch.of(masked, CPU)
    assert torch.equal(batch.mask_BT, plain.mask_BT)
    assert batch.loss_mask_BT[batch.mask_BT].tolist() == [keep for mask in masks for keep in mask]
    assert not batch.loss_mask_BT[~batch.mask_BT].any()
    assert [s.loss_tokens for s in masked] == batch.loss_mask_BT.sum(1).tolist()
    assert [s.loss_tokens for s in sequences] == [len(s.response_ids) for s in sequences]


@given(SEQUENCES)
def test_padded_values_are_the_given_ones_under_the_mask(sequences: list[TrainSequence]) -> None:
    mask_BT = PaddedBatch.of(sequences, CPU).mask_BT
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


@given(st.lists(st.integers(1, 50), max_size=20), st.integers(1, 8))
def test_micro_batches_partition_by_length(lengths: list[int], size: int) -> None:
    chunks = micro_batches(lengths, size)
    order = [i for chunk in chunks for i in chunk]
    assert sorted(order) == list(range(len(lengths)))
    assert [lengths[i] for i in order] == sorted(lengths)
    assert all(len(chunk) == size for chunk in chunks[:-1])
    assert all(0 < len(chunk) <= size for chunk in chunks)

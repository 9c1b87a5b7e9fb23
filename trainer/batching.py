"""From sequences to tensors, and which sequences share a forward.

Suffixes: N flat tokens, S sampled response tokens, B sequences, L padded tokens, T padded response tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from typing import Self

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from qarl.errors import ObjectiveError
from qarl.numerics.flat import Row, flat_rows
from qarl.types import TrainSequence


@dataclass(frozen=True)
class Batch:
    """The sequences of one forward. Neighbours with equal prompts share one copy of the prompt.

    Every turn of a sequence is a row of its own, whose prompt is everything before it, as in the engine: there it was a
    request of its own, and the tokens of earlier turns were computed again.
    """

    sequences: Sequence[TrainSequence]
    rows: Sequence[Row]
    """First all first turns, which share prompts, then the later ones."""
    ids_N: Tensor
    """Tokens of the flat batch. The last token of a turn predicts nothing and is left out."""
    predicts_S: Tensor
    """Flat index of the token whose output predicts each sampled response token, response after response."""
    sampled_S: Tensor
    """The sampled response tokens."""
    mask_BT: Tensor
    """bool, True at response tokens that were sampled."""
    loss_mask_BT: Tensor
    """bool, True at the response tokens that the loss counts."""

    @classmethod
    def of(cls, sequences: Sequence[TrainSequence], device: torch.device) -> Self:
        turns = [(number, *turn) for number, sequence in enumerate(sequences) for turn in sequence.turns]
        turns.sort(key=lambda turn: turn[1] > 0)  # stable
        prompts = [sequences[number].prompt_ids + sequences[number].response_ids[:start] for number, start, _ in turns]
        rows = flat_rows(prompts, [max(0, end - start - 1) for _, start, end in turns])
        ids: list[int] = []
        predicts: dict[tuple[int, int], Tensor] = {}
        for row, prompt, (number, start, end) in zip(rows, prompts, turns, strict=True):
            ids += prompt if row.owns_prompt else ()
            ids += sequences[number].response_ids[start : end - 1]
            predicts[number, start] = row.tokens()[row.prompt_len - 1 :][: end - start]
        mask_BT = _padded_masks(
            [np.ones(len(s.response_ids)) if s.sampled_T is None else s.sampled_T for s in sequences]
        )
        loss_mask_BT = _padded_masks([s.counted_T for s in sequences])
        responses = [s.at_sampled(np.array(s.response_ids, np.int64)) for s in sequences]
        sampled_S = torch.from_numpy(np.concatenate(responses))
        tensors = (
            torch.tensor(ids),
            torch.cat([predicts[key] for key in sorted(predicts)]),
            sampled_S,
            mask_BT,
            loss_mask_BT,
        )
        return cls(sequences, rows, *(tensor.to(device) for tensor in tensors))

    def padded(self) -> tuple[Tensor, Tensor]:
        """For transformers' own forward, whole sequences: right-padded ids [B, L], and a mask [B, L] that is True at
        real tokens."""
        rows = [torch.tensor((*s.prompt_ids, *s.response_ids)) for s in self.sequences]
        ids_BL = pad_sequence(rows, batch_first=True)
        lengths_B = torch.tensor([len(row) for row in rows])
        mask_BL = torch.arange(ids_BL.shape[1]) < lengths_B[:, None]
        return ids_BL.to(self.ids_N.device), mask_BL.to(self.ids_N.device)

    def predicts_BL(self) -> tuple[Tensor, Tensor]:
        """Rows and columns of the padded ids whose outputs predict each sampled token: the padded `predicts_S`."""
        row, step = self.mask_BT.nonzero(as_tuple=True)
        prompt_B = torch.tensor([len(s.prompt_ids) for s in self.sequences], device=row.device)
        return row, prompt_B[row] + step - 1


def _padded_masks(masks: Sequence[np.ndarray]) -> Tensor:
    return pad_sequence([torch.tensor(mask, dtype=torch.bool) for mask in masks], batch_first=True)


def pad(values: Sequence[np.ndarray], like: Tensor) -> Tensor:
    """Per-token values of each sequence as a zero-padded float32 tensor in the shape and place of `like` [B, T]."""
    out = torch.zeros(like.shape, dtype=torch.float32)
    for row, value in enumerate(values):
        out[row, : len(value)] = torch.from_numpy(np.array(value, dtype=np.float32))
    return out.to(like.device)


def prox_of(sequence: TrainSequence) -> np.ndarray:
    """log pi_prox of the response. Raises ObjectiveError when the sequence has none."""
    if sequence.prox_logprobs_T is None:
        raise ObjectiveError(f"sequence '{sequence.id}' has no prox log-probs")
    return sequence.prox_logprobs_T


def micro_batches(
    sequences: Sequence[TrainSequence], max_tokens: int, num_ranks: int = 1, padded: bool = False
) -> list[list[list[int]]]:
    """Indices of `sequences` by rank and micro-batch: each rank gets as many micro-batches, some may be empty.

    Responses to one prompt stay together, so that it is computed once, unless they exceed `max_tokens` or what one rank
    should take. The groups, longest first, each go to the emptiest micro-batch; there are as few micro-batches as hold
    `max_tokens` each. `padded`: tokens are those of rows padded to the longest, each with its prompt.
    Raises ValueError: a sequence alone exceeds `max_tokens`.
    """
    tokens = _padded_tokens if padded else _tokens
    groups, everything = _groups(sequences), range(len(sequences))
    total = sum(tokens(sequences, [group]) for group in groups)
    limit = min(max_tokens, max(-(-total // num_ranks), max(tokens(sequences, [[i]]) for i in everything)))
    parts = [part for group in groups for part in _split(sequences, group, limit, tokens)]
    parts.sort(key=lambda part: -tokens(sequences, [part]))  # stable: equal lengths keep their order
    count = num_ranks * -(-sum(tokens(sequences, [part]) for part in parts) // (num_ranks * max_tokens))
    while True:
        bins: list[list[list[int]]] = [[] for _ in range(count)]
        loads = [0] * count
        for part in parts:
            emptiest = loads.index(min(loads))
            bins[emptiest].append(part)
            loads[emptiest] = tokens(sequences, bins[emptiest])
        if max(loads) <= max_tokens:
            return [[list(chain(*bin_)) for bin_ in bins[rank::num_ranks]] for rank in range(num_ranks)]
        count += num_ranks


def _groups(sequences: Sequence[TrainSequence]) -> list[list[int]]:
    """Neighbours with equal prompts."""
    return [list(group) for _, group in groupby(range(len(sequences)), key=lambda i: sequences[i].prompt_ids)]


def _tokens(sequences: Sequence[TrainSequence], groups: Sequence[Sequence[int]]) -> int:
    """Tokens of groups of responses, each group to one prompt."""
    prompts = sum(len(sequences[group[0]].prompt_ids) for group in groups)
    return prompts + sum(sequences[i].forward_tokens for i in chain(*groups))


def _padded_tokens(sequences: Sequence[TrainSequence], groups: Sequence[Sequence[int]]) -> int:
    """Tokens of groups as rows, one for each turn, that are as long as the longest sequence."""
    rows = [sequences[i] for i in chain(*groups)]
    longest = max(len(sequence.prompt_ids) + len(sequence.response_ids) for sequence in rows)
    return longest * sum(len(sequence.turns) for sequence in rows)


def _split(
    sequences: Sequence[TrainSequence], group: Sequence[int], limit: int, tokens: Callable[..., int]
) -> list[list[int]]:
    """A group in runs of at most `limit` tokens each, the prompt counted in every one."""
    parts: list[list[int]] = []
    for i in group:
        if parts and tokens(sequences, [[*parts[-1], i]]) <= limit:
            parts[-1].append(i)
        elif tokens(sequences, [[i]]) <= limit:
            parts.append([i])
        else:
            raise ValueError(f"a sequence of {tokens(sequences, [[i]])} tokens exceeds {limit} tokens a micro-batch")
    return parts

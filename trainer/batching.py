"""From sequences to tensors, and which sequences share a forward.

Suffixes: N flat tokens, S response tokens, B sequences, L padded tokens, T padded response tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
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
    """The sequences of one forward. Neighbours with equal prompts share one copy of the prompt."""

    sequences: Sequence[TrainSequence]
    rows: Sequence[Row]
    ids_N: Tensor
    """Tokens of the flat batch. The last token of a response predicts nothing and is left out."""
    predicts_S: Tensor
    """Flat index of the token whose output predicts each response token, response after response."""
    sampled_S: Tensor
    """The response tokens."""
    mask_BT: Tensor
    """bool, True at response tokens."""
    loss_mask_BT: Tensor
    """bool, True at the response tokens that the loss counts."""

    @classmethod
    def of(cls, sequences: Sequence[TrainSequence], device: torch.device) -> Self:
        rows = flat_rows([s.prompt_ids for s in sequences], [max(0, len(s.response_ids) - 1) for s in sequences])
        ids: list[int] = []
        predicts: list[Tensor] = []
        for row, sequence in zip(rows, sequences, strict=True):
            ids += sequence.prompt_ids if row.owns_prompt else ()
            ids += sequence.response_ids[:-1]
            predicts.append(row.tokens()[row.prompt_len - 1 :][: len(sequence.response_ids)])
        lengths_B = torch.tensor([len(s.response_ids) for s in sequences])
        mask_BT = torch.arange(int(lengths_B.max())) < lengths_B[:, None]
        loss_mask_BT = mask_BT.clone()
        for number, sequence in enumerate(sequences):
            if sequence.loss_mask_T is not None:
                loss_mask_BT[number, : lengths_B[number]] = torch.tensor(sequence.loss_mask_T)
        sampled_S = torch.tensor([t for sequence in sequences for t in sequence.response_ids], dtype=torch.int64)
        tensors = (torch.tensor(ids), torch.cat(predicts), sampled_S, mask_BT, loss_mask_BT)
        return cls(sequences, rows, *(tensor.to(device) for tensor in tensors))

    def padded(self) -> tuple[Tensor, Tensor]:
        """For transformers' own forward: right-padded ids [B, L], and a mask [B, L] that is True at real tokens."""
        rows = [torch.tensor((*s.prompt_ids, *s.response_ids)) for s in self.sequences]
        ids_BL = pad_sequence(rows, batch_first=True)
        lengths_B = torch.tensor([len(row) for row in rows])
        mask_BL = torch.arange(ids_BL.shape[1]) < lengths_B[:, None]
        return ids_BL.to(self.ids_N.device), mask_BL.to(self.ids_N.device)

    def predicts_BL(self) -> tuple[Tensor, Tensor]:
        """Rows and columns of the padded ids whose outputs predict each response token: the padded `predicts_S`."""
        row, step = self.mask_BT.nonzero(as_tuple=True)
        prompt_B = torch.tensor([len(s.prompt_ids) for s in self.sequences], device=row.device)
        return row, prompt_B[row] + step - 1


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


def micro_batches(sequences: Sequence[TrainSequence], max_tokens: int, num_ranks: int = 1) -> list[list[list[int]]]:
    """Indices of `sequences` by rank and micro-batch: each rank gets as many micro-batches, some may be empty.

    Responses to one prompt stay together, so that it is computed once, unless they exceed `max_tokens` or what one rank
    should take. The groups, longest first, each go to the emptiest micro-batch; there are as few micro-batches as hold
    `max_tokens` each. Raises ValueError: a sequence alone exceeds `max_tokens`.
    """
    total = sum(_tokens(sequences, group) for group in _groups(sequences))
    limit = min(
        max_tokens, max(-(-total // num_ranks), max(len(s.prompt_ids) + len(s.response_ids) for s in sequences))
    )
    parts = [part for group in _groups(sequences) for part in _split(sequences, group, limit)]
    parts.sort(key=lambda part: -_tokens(sequences, part))  # stable: equal lengths keep their order
    count = num_ranks * -(-total // (num_ranks * max_tokens))
    while True:
        bins: list[list[int]] = [[] for _ in range(count)]
        loads = [0] * count
        for part in parts:
            emptiest = loads.index(min(loads))
            bins[emptiest] += part
            loads[emptiest] += _tokens(sequences, part)
        if max(loads) <= max_tokens:
            return [bins[rank::num_ranks] for rank in range(num_ranks)]
        count += num_ranks


def _groups(sequences: Sequence[TrainSequence]) -> list[list[int]]:
    """Neighbours with equal prompts."""
    return [list(group) for _, group in groupby(range(len(sequences)), key=lambda i: sequences[i].prompt_ids)]


def _tokens(sequences: Sequence[TrainSequence], group: Sequence[int]) -> int:
    """Tokens of a group of responses to one prompt."""
    return len(sequences[group[0]].prompt_ids) + sum(len(sequences[i].response_ids) for i in group)


def _split(sequences: Sequence[TrainSequence], group: Sequence[int], limit: int) -> list[list[int]]:
    """A group in runs of at most `limit` tokens each, the prompt counted in every one."""
    parts: list[list[int]] = []
    for i in group:
        if parts and _tokens(sequences, [*parts[-1], i]) <= limit:
            parts[-1].append(i)
        elif _tokens(sequences, [i]) <= limit:
            parts.append([i])
        else:
            raise ValueError(f"a sequence of {_tokens(sequences, [i])} tokens exceeds {limit} tokens a micro-batch")
    return parts

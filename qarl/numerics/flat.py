"""A forward without padding: all tokens in one row, each prompt once for all of its responses.

Suffixes: N tokens of the flat batch, R responses, L tokens of the longest prompt and response.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Row:
    """Where one response and its prompt lie in the flat batch, by token.

    Example: two responses of 3 and 2 tokens to a prompt of 4 tokens lie as `P P P P a a a b b`, in the rows
    `Row(0, 4, 4, 3, True)` and `Row(0, 4, 7, 2, False)`.
    """

    prompt_start: int
    prompt_len: int
    response_start: int
    response_len: int
    owns_prompt: bool
    """The first row of a prompt: its attention stands for the prompt's tokens."""

    def tokens(self) -> Tensor:
        """Flat index of every token of prompt and response, in order."""
        prompt = torch.arange(self.prompt_start, self.prompt_start + self.prompt_len)
        return torch.cat((prompt, torch.arange(self.response_start, self.response_start + self.response_len)))


def flat_rows(prompts: Sequence[Sequence[int]], response_lens: Sequence[int]) -> list[Row]:
    """The rows of responses to `prompts`; neighbours of equal prompts share one copy of it."""
    rows: list[Row] = []
    end = start = 0
    for index, (prompt, length) in enumerate(zip(prompts, response_lens, strict=True)):
        owns = index == 0 or prompt != prompts[index - 1]
        if owns:
            start, end = end, end + len(prompt)
        rows.append(Row(start, len(prompt), end, length, owns))
        end += length
    return rows


class FlatLayout:
    """Maps per-token values between the flat batch and padded rows, for attention in torch.

    Args:
        rows: of `flat_rows`.
    """

    def __init__(self, rows: Sequence[Row], device: torch.device | None = None) -> None:
        tokens = [row.tokens() for row in rows]
        padded_RL = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True)
        width = padded_RL.shape[1]
        # Padding points at token 0. Causality hides it from every real token, and nothing reads its own output.
        positions_N = torch.empty(rows[-1].response_start + rows[-1].response_len, dtype=torch.int64)
        home_N = torch.empty_like(positions_N)
        for number, (row, indices) in enumerate(zip(rows, tokens, strict=True)):
            first = 0 if row.owns_prompt else row.prompt_len
            own = torch.arange(first, len(indices))
            positions_N[indices[first:]] = own
            home_N[indices[first:]] = number * width + own
        self.positions_N = positions_N.to(device)
        self._padded_RL, self._home_N = padded_RL.to(device), home_N.to(device)
        # `index_select`, because the backward of plain indexing is several times slower on CPU.

    def pad(self, x_N: Tensor) -> Tensor:
        """[N, ...] -> [R, L, ...]; a prompt's values stand in the row of each of its responses."""
        return x_N.index_select(0, self._padded_RL.flatten()).unflatten(0, self._padded_RL.shape)

    def flatten(self, x_RL: Tensor) -> Tensor:
        """[R, L, ...] -> [N, ...]; a prompt's values are those of its first row."""
        return x_RL.flatten(0, 1).index_select(0, self._home_N)

"""From sequences to padded tensors. Suffixes: B sequences, L padded tokens, T padded response tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from qarl.types import TrainSequence


@dataclass(frozen=True)
class PaddedBatch:
    """Right-padded sequences of one forward."""

    input_ids_BL: Tensor
    prompt_lens: list[int]
    seq_lens: list[int]
    mask_BT: Tensor
    """bool, True at response tokens."""
    loss_mask_BT: Tensor
    """bool, True at the response tokens that the loss counts."""

    @classmethod
    def of(cls, sequences: Sequence[TrainSequence], device: torch.device) -> PaddedBatch:
        prompt_lens = [len(s.prompt_ids) for s in sequences]
        seq_lens = [len(s.prompt_ids) + len(s.response_ids) for s in sequences]
        input_ids_BL = torch.zeros(len(sequences), max(seq_lens), dtype=torch.int64)
        for row, sequence in enumerate(sequences):
            ids = (*sequence.prompt_ids, *sequence.response_ids)
            input_ids_BL[row, : len(ids)] = torch.tensor(ids)
        lengths_B = torch.tensor([len(s.response_ids) for s in sequences])
        mask_BT = torch.arange(int(lengths_B.max())) < lengths_B[:, None]
        loss_mask_BT = mask_BT.clone()
        for row, sequence in enumerate(sequences):
            if sequence.loss_mask_T is not None:
                loss_mask_BT[row, : lengths_B[row]] = torch.tensor(sequence.loss_mask_T)
        return cls(input_ids_BL.to(device), prompt_lens, seq_lens, mask_BT.to(device), loss_mask_BT.to(device))

    def response_positions(self) -> tuple[Tensor, Tensor]:
        """Rows and columns, in `input_ids_BL`, of the tokens whose output predicts each response token, in order."""
        row, step = self.mask_BT.nonzero(as_tuple=True)
        prompt_B = torch.tensor(self.prompt_lens, device=row.device)
        return row, prompt_B[row] + step - 1


def pad(values: Sequence[np.ndarray], like: Tensor) -> Tensor:
    """Per-token values of each sequence as a zero-padded float32 tensor in the shape and place of `like` [B, T]."""
    out = torch.zeros(like.shape, dtype=torch.float32)
    for row, value in enumerate(values):
        out[row, : len(value)] = torch.from_numpy(np.array(value, dtype=np.float32))
    return out.to(like.device)


def micro_batches(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Indices in chunks of at most `size`, sorted by length so that little is padded."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    return [order[i : i + size] for i in range(0, len(order), size)]

"""Length-normalised sequence ratios (GSPO, arXiv 2507.18071). Suffixes: B sequences, T response tokens."""

from __future__ import annotations

import torch
from torch import Tensor


def sequence_log_ratio(logp_BT: Tensor, logp_ref_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """`(1/T_b) sum_t [log p(y_t) - log p_ref(y_t)]` over the unmasked tokens: float32 [B], in nats per token.

    Masked values are ignored whatever they are, NaN and infinity included.

    Raises:
        ValueError: shapes differ, or a sequence has no unmasked token.
    """
    if not logp_BT.shape == logp_ref_BT.shape == mask_BT.shape:
        raise ValueError(
            f"log-probs {tuple(logp_BT.shape)}, reference {tuple(logp_ref_BT.shape)} and mask {tuple(mask_BT.shape)} "
            "must have one shape"
        )
    lengths_B = mask_BT.sum(1)
    if (lengths_B == 0).any():
        raise ValueError(f"sequences {(lengths_B == 0).nonzero()[:, 0].tolist()} have no response token")
    # The masked log-probs are replaced before the subtraction: a NaN times zero would reach the gradient.
    diff_BT = logp_BT.masked_fill(~mask_BT, 0.0).float() - logp_ref_BT.masked_fill(~mask_BT, 0.0).float()
    return torch.sum(diff_BT, dim=1) / lengths_B

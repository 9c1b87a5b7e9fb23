"""From terms to the loss. Every sum is divided by a size of the whole minibatch, so that neither the split into
micro-batches nor the number of ranks matters. Suffixes: B sequences, T response tokens.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from qarl.metrics import Metrics, effective_sample_size, maximum, mean
from qarl.objectives.ratios import LossInputs, Ratios, bounded_exp


def token_sums(terms_BT: Tensor, weight: Tensor | None, mask_BT: Tensor) -> Tensor:
    """Sum over the response of each sequence's weighted terms: [B]. `weight` is None, [B] or [B, T]."""
    if weight is not None and weight.dim() == 2:
        terms_BT = terms_BT * weight
    sums_B = torch.where(mask_BT, terms_BT, 0.0).sum(1)
    return sums_B * weight if weight is not None and weight.dim() == 1 else sums_B


def sequence_weight(weight: Tensor | None, ratios: Ratios, mask_BT: Tensor) -> Tensor:
    """The weight of a sequence-level term: [B]. Interpreted: of token weights, the mean over the response."""
    if weight is None:
        return torch.ones_like(ratios.log_w_B)
    return weight if weight.dim() == 1 else token_sums(weight, None, mask_BT) / ratios.lengths_B


def reduce(
    sums_B: Tensor,
    inputs: LossInputs,
    ratios: Ratios,
    how: Literal["sequence_mean", "token_mean", "constant"],
    normalizer: int = 1,
) -> tuple[Tensor, Metrics]:
    """The loss and its metric, from the token sums of the objective.

    sequence_mean   -(1/num_sequences) sum_b sums_b / T_b       constant   -(1/num_sequences) sum_b sums_b / L
    token_mean      -(1/num_tokens) sum_b sums_b
    """
    match how:
        case "sequence_mean":
            total, size, here = (sums_B / ratios.lengths_B).sum(), inputs.num_sequences, len(sums_B)
        case "constant":
            total, size, here = sums_B.sum() / normalizer, inputs.num_sequences, len(sums_B)
        case "token_mean":
            total, size, here = sums_B.sum(), inputs.num_tokens, int(ratios.lengths_B.sum())
    return -total / size, {"actor/loss": mean(-total.item(), here)} | ratio_metrics(ratios)


def drop_metrics(clipped: Tensor | None, masked: Tensor | None, advantage_B: Tensor, lengths_B: Tensor) -> Metrics:
    """Which tokens have no gradient although their advantage is not 0, and which sequences have no other tokens.

    Args:
        clipped, masked: what a clip, and a correction's mask, leave without gradient: bool, [B] or [B, T] (False for
            padding); None for nothing.
    """
    if clipped is not None and masked is not None and clipped.dim() == masked.dim():
        clipped, masked = clipped | masked, None
    tokens_B = torch.zeros_like(lengths_B)
    for part in (clipped, masked):
        if part is not None:  # of one for sequences and one for tokens, the larger count is that of their union
            tokens_B = torch.maximum(tokens_B, part.sum(1) if part.dim() == 2 else part * lengths_B)
    tokens_B = torch.where(advantage_B == 0, 0, tokens_B)
    gone_B = tokens_B == lengths_B
    metrics: Metrics = {
        "actor/tokens_dropped": mean(int(tokens_B.sum()), int(lengths_B.sum())),
        "actor/sequences_dropped": mean(int(gone_B.sum()), len(gone_B)),
    }
    for name, part_B in (("kept", lengths_B[~gone_B]), ("dropped", lengths_B[gone_B])):
        if len(part_B):
            metrics[f"response_length/{name}_mean"] = mean(int(part_B.sum()), len(part_B))
            metrics[f"response_length/{name}_max"] = maximum(int(part_B.max()))
    return metrics


def ratio_metrics(ratios: Ratios) -> Metrics:
    """Where the sequence ratios r_seq are."""
    r_B = bounded_exp(ratios.log_r_B.detach())
    total = r_B.sum().item()
    return {
        "actor/ppo_kl": mean(-ratios.log_r_B.detach().sum().item(), len(r_B)),
        "actor/seq_ratio_mean": mean(total, len(r_B)),
        "actor/seq_ratio_eff_sample_size": effective_sample_size(total, r_B.square().sum().item(), len(r_B)),
        "actor/seq_ratio_max_dev": maximum((r_B - 1).abs().max().item()),
    }

"""From the terms of tokens to the loss. Every sum is divided by a size of the whole minibatch, so neither the split
into micro-batches nor the number of ranks matters.
"""

from typing import Literal

import torch
from torch import Tensor

from qarl.metrics import Metrics, effective_sample_size, maximum, mean
from qarl.objectives.corrections import Weight
from qarl.objectives.ratios import LossInputs, Ratios, bounded_exp


def token_sums(terms_BT: Tensor, weight: Weight, mask_BT: Tensor) -> Tensor:
    """Sum over the response of each sequence's weighted terms: [B]."""
    return torch.where(mask_BT, terms_BT * weight.token_BT, 0.0).sum(1) * weight.sequence_B


def sequence_weight(weight: Weight, ratios: Ratios, mask_BT: Tensor) -> Tensor:
    """The weight of a sequence-level term: [B]. Per-token weights are averaged over the response (our choice; the
    papers do not say)."""
    return (weight.token_BT * mask_BT).sum(1) / ratios.lengths_B * weight.sequence_B


def reduce(
    sums_B: Tensor,
    inputs: LossInputs,
    ratios: Ratios,
    how: Literal["sequence_mean", "token_mean", "constant"],
    normalizer: int = 1,
) -> tuple[Tensor, Metrics]:
    """The loss and its metrics, from each sequence's sum over its tokens.

    sequence_mean   -(1/num_sequences) sum_b sums_b / T_b       constant   -(1/num_sequences) sum_b sums_b / L
    token_mean      -(1/num_tokens) sum_b sums_b
    """
    match how:
        case "sequence_mean":
            total, size, count = (sums_B / ratios.lengths_B).sum(), inputs.num_sequences, len(sums_B)
        case "constant":
            total, size, count = sums_B.sum() / normalizer, inputs.num_sequences, len(sums_B)
        case "token_mean":
            total, size, count = sums_B.sum(), inputs.num_tokens, int(ratios.lengths_B.sum())
    return -total / size, {"actor/loss": mean(-total.item(), count)} | ratio_metrics(ratios)


def drop_metrics(dropped: Tensor, inputs: LossInputs, lengths_B: Tensor) -> Metrics:
    """The share of tokens without gradient although their advantage is not 0, the share of sequences that have only
    such tokens, and the lengths of these and of the other sequences.

    Args:
        dropped: bool, [B, T], or [B, 1] for whole sequences: what a clip or a mask leaves without gradient.
    """
    tokens_B = torch.where(inputs.advantage_B == 0, 0, (dropped & inputs.mask_BT).sum(1))
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
    """Mean, effective sample size and largest deviation from 1 of the sequence ratios r_seq."""
    r_B = bounded_exp(ratios.log_r_B.detach())
    total = r_B.sum().item()
    return {
        "actor/ppo_kl": mean(-ratios.log_r_B.detach().sum().item(), len(r_B)),
        "actor/seq_ratio_mean": mean(total, len(r_B)),
        "actor/seq_ratio_eff_sample_size": effective_sample_size(total, r_B.square().sum().item(), len(r_B)),
        "actor/seq_ratio_max_dev": maximum((r_B - 1).abs().max().item()),
    }

"""TBPO, trust-band policy optimization (arXiv 2604.07853). Suffixes: B sequences, T response tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from qarl.config import TBPOConfig
from qarl.errors import DivergenceError
from qarl.metrics import Metrics, maximum, mean
from qarl.objectives.ratios import sequence_log_ratio


def tbpo(
    logp_theta_BT: Tensor,
    logp_prox_BT: Tensor,
    logp_samp_BT: Tensor,
    mask_BT: Tensor,
    advantage_B: Tensor,
    config: TBPOConfig,
    num_sequences: int,
) -> tuple[Tensor, Metrics]:
    """Sequence-level policy gradient with a trust band on both sides for negative advantages.

        r = exp((1/T) sum_t log pi_theta/pi_prox)          w = exp((1/T) sum_t log pi_prox/pi_samp)
        s = min(r A, clip(r, 1-eps_low, 1+eps_high) A)     for A >= 0
        s = clip(r, 1-neg_low, 1+neg_high) A               for A < 0: no gradient outside the band
        loss = -(1/num_sequences) sum_b sg(min(w, C)) s

    Args:
        logp_theta_BT, logp_prox_BT, logp_samp_BT: log-probs in nats of the sampled tokens under the learner now, the
            learner before this batch, and the sampler; the gradient flows through the first only.
        mask_BT: bool, True at response tokens.
        advantage_B: one advantage a sequence.
        num_sequences: normaliser, the sequences of the whole minibatch (over all micro-batches and ranks).
    Returns:
        scalar loss (float32) and partial metrics. A clip is counted where the chosen branch is the clipped one.
    Raises:
        ValueError: shapes differ, or a sequence is empty.
        DivergenceError: a sampled token has a NaN or infinite log-prob.
    """
    if advantage_B.shape != mask_BT.shape[:1]:
        raise ValueError(f"{tuple(advantage_B.shape)} advantages for {mask_BT.shape[0]} sequences")
    log_r_B = sequence_log_ratio(logp_theta_BT, logp_prox_BT.detach(), mask_BT)
    log_w_B = sequence_log_ratio(logp_prox_BT.detach(), logp_samp_BT.detach(), mask_BT)
    broken_B = ~(torch.isfinite(log_r_B) & torch.isfinite(log_w_B))
    if broken_B.any():
        raise DivergenceError(
            f"NaN or infinite log-prob in sequences {broken_B.nonzero()[:, 0].tolist()}",
            mend="lower learner.optimizer.lr, or continue from the last checkpoint with other settings",
        )
    # Every band ends far below e^20; beyond it exp could overflow, and infinity times a zero gradient is NaN.
    r_B, w_B = log_r_B.clamp(max=20.0).exp(), log_w_B.clamp(max=20.0).exp()
    ppo_B = torch.minimum(
        r_B * advantage_B, r_B.clamp(1 - config.seq_clip_ratio_low, 1 + config.seq_clip_ratio_high) * advantage_B
    )
    dual_B = r_B.clamp(1 - config.neg_seq_clip_ratio_low, 1 + config.neg_seq_clip_ratio_high) * advantage_B
    weight_B = w_B.clamp(max=config.seq_tis_imp_ratio_cap)
    loss = -(weight_B * torch.where(advantage_B >= 0, ppo_B, dual_B)).sum() / num_sequences
    return loss, _metrics(loss.detach() * num_sequences, r_B.detach(), w_B, advantage_B, config)


def _metrics(loss_sum: Tensor, r_B: Tensor, w_B: Tensor, advantage_B: Tensor, config: TBPOConfig) -> Metrics:
    negative_B = advantage_B < 0
    pos_high_B = (advantage_B > 0) & (r_B > 1 + config.seq_clip_ratio_high)
    neg_low_B = negative_B & (r_B < 1 - config.neg_seq_clip_ratio_low)
    neg_high_B = negative_B & (r_B > 1 + config.neg_seq_clip_ratio_high)
    count, negatives = len(r_B), int(negative_B.sum())
    return {
        "actor/loss": mean(loss_sum.item(), count),
        "actor/clip_fraction": mean((pos_high_B | neg_low_B | neg_high_B).sum().item(), count),
        "actor/clip_fraction_pos_high": mean(pos_high_B.sum().item(), count - negatives),
        "actor/clip_fraction_neg_low": mean(neg_low_B.sum().item(), negatives),
        "actor/clip_fraction_neg_high": mean(neg_high_B.sum().item(), negatives),
        "actor/ppo_kl": mean(-r_B.log().sum().item(), count),
        "actor/seq_ratio_mean": mean(r_B.sum().item(), count),
        "actor/seq_ratio_max_dev": maximum((r_B - 1).abs().max().item()),
        "actor/seq_mismatch_weight_mean": mean(w_B.sum().item(), count),
        "actor/seq_mismatch_weight_capped": mean((w_B > config.seq_tis_imp_ratio_cap).sum().item(), count),
    }

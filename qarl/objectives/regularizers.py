"""Terms that any objective can have: the KL to a reference policy, and entropy.

Both are averaged over the tokens of a response, then over the sequences of the minibatch, however the objective
averages its own terms (as in GRPO's equation, arXiv 2402.03300). Sequences that a correction dropped are included.
"""

from typing import Literal

import torch
from torch import Tensor

from qarl.config.objective import ObjectiveConfig
from qarl.metrics import Metrics, mean
from qarl.objectives.ratios import LARGEST_LOG, LossInputs, check_finite, token_log_ratio


def regularize(loss: Tensor, inputs: LossInputs, config: ObjectiveConfig) -> tuple[Tensor, Metrics]:
    """`loss + kl_coef * KL(pi_theta || reference) - entropy_coef * H`, and both as partial metrics.

    The objective has checked `inputs` with `Ratios.of`.
    Raises DivergenceError: a sampled token has a NaN or infinite log-prob under the reference, or such an entropy.
    """
    metrics: Metrics = {}
    lengths_B = inputs.mask_BT.sum(1)
    if inputs.entropy_BT is not None:
        entropy_B = torch.where(inputs.mask_BT, inputs.entropy_BT, 0.0).sum(1)
        check_finite(torch.isfinite(entropy_B), inputs, "entropy")
        metrics["actor/entropy"] = mean(entropy_B.detach().sum().item(), int(lengths_B.sum()))
        if config.entropy_coef:
            loss = loss - config.entropy_coef * (entropy_B / lengths_B).sum() / inputs.num_sequences
    if inputs.logp_ref_BT is not None:
        log_ratio_BT = token_log_ratio(inputs.logp_ref_BT.detach(), inputs.logp_theta_BT, inputs.mask_BT)
        kl_B = kl_penalty(log_ratio_BT, config.kl_estimator).sum(1) / lengths_B
        check_finite(torch.isfinite(log_ratio_BT).all(1) & torch.isfinite(kl_B), inputs)
        metrics["actor/kl_loss"] = mean(kl_B.detach().sum().item(), len(kl_B))
        loss = loss + config.kl_coef * kl_B.sum() / inputs.num_sequences
    return loss, metrics


def kl_penalty(log_ratio_BT: Tensor, estimator: Literal["k1", "k2", "k3"]) -> Tensor:
    """Estimates of KL(p || q) from `d = log q - log p` at tokens sampled from p; 0 where d is 0.

        k1 = -d        k2 = d^2 / 2        k3 = e^d - 1 - d        (http://joschu.net/blog/kl-approx.html)

    k1 and k3 are unbiased as values. As a loss k2 has the KL's own gradient; the gradient of k3 is that of KL(q || p),
    and that of k1 is zero on average (arXiv 2510.01555). k3 is constant, without gradient, beyond d = 20.
    """
    match estimator:
        case "k1":
            return -log_ratio_BT
        case "k2":
            return log_ratio_BT.square() / 2
        case "k3":
            # Bounded in both terms: else the gradient of -d alone would push a large d further up.
            bounded_BT = log_ratio_BT.clamp(max=LARGEST_LOG)
            return bounded_BT.exp() - 1 - bounded_BT

"""The KL penalty and the entropy bonus: as values, as gradients, and beside any objective."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qarl.config.objective import DAPOConfig, GRPOConfig, TBPOConfig
from qarl.errors import DivergenceError, ObjectiveError
from qarl.objectives.ratios import LossInputs
from qarl.objectives.registry import compute_loss
from qarl.objectives.regularizers import kl_penalty
from tests.support.objectives import BATCHES, Batch, numbers, random_batch

ESTIMATORS: Any = ("k1", "k2", "k3")
BOTH = {"kl_coef": 0.3, "entropy_coef": 0.2}


def with_extras(batch: Batch, whole: Batch | None = None) -> LossInputs:
    """The batch's inputs with a reference (its own sampler's log-probs) and made-up entropies (theta squared)."""
    inputs = batch.inputs(whole)
    return LossInputs(
        inputs.logp_theta_BT,
        inputs.logp_prox_BT,
        inputs.logp_samp_BT,
        inputs.mask_BT,
        inputs.advantage_B,
        inputs.num_sequences,
        inputs.num_tokens,
        inputs.ids,
        logp_ref_BT=batch.samp_BT,
        entropy_BT=inputs.logp_theta_BT.square(),
    )


def run(batch: Batch, config: Any, whole: Batch | None = None) -> tuple[Tensor, Tensor, dict[str, float]]:
    theta_BT = batch.theta_BT.clone().requires_grad_()
    leaf = Batch(theta_BT, batch.prox_BT, batch.samp_BT, batch.mask_BT, batch.advantage_B)
    loss, metrics = compute_loss(with_extras(leaf, whole), config)
    (grad_BT,) = torch.autograd.grad(loss, theta_BT)
    return loss.detach(), grad_BT, numbers([metrics])


@pytest.mark.parametrize(
    ("estimator", "value"), [("k1", -math.log(2)), ("k2", math.log(2) ** 2 / 2), ("k3", 1 - math.log(2))]
)
def test_one_token_by_hand(estimator: Any, value: float) -> None:
    doubled = torch.tensor([[math.log(2)]], dtype=torch.float64)
    assert kl_penalty(doubled, estimator).item() == pytest.approx(value, rel=1e-12)
    assert not kl_penalty(torch.zeros(2, 3), estimator).any()


@pytest.mark.parametrize("d", [19.0, 20.0, 25.0, 1e4])
def test_k3_never_pulls_away_from_the_reference(d: float) -> None:
    logp = torch.tensor(-d, dtype=torch.float64, requires_grad=True)  # the reference has log-prob 0
    value = kl_penalty(0.0 - logp, "k3")
    (gradient,) = torch.autograd.grad(value, logp)
    assert gradient == pytest.approx(1 - math.exp(d) if d <= 20 else 0.0)
    assert value > 0


def exact(logits_V: Tensor, reference_V: Tensor, estimator: Any) -> tuple[Tensor, Tensor]:
    """Value and gradient of an estimator, averaged exactly over the tokens that p may draw."""
    leaf_V = logits_V.clone().requires_grad_()
    logp_V, logq_V = torch.log_softmax(leaf_V, 0), torch.log_softmax(reference_V, 0)
    value = (logp_V.detach().exp() * kl_penalty(logq_V - logp_V, estimator)).sum()
    return value.detach(), torch.autograd.grad(value, leaf_V)[0]


def kl(logits_V: Tensor, reference_V: Tensor, forward: bool) -> tuple[Tensor, Tensor]:
    leaf_V = logits_V.clone().requires_grad_()
    p, q = (torch.distributions.Categorical(logits=x) for x in (leaf_V, reference_V))
    value = torch.distributions.kl_divergence(*((p, q) if forward else (q, p)))
    return value.detach(), torch.autograd.grad(value, leaf_V)[0]


@given(seed=st.integers(0, 10**6), size=st.integers(2, 8))
@settings(max_examples=40, deadline=None)
def test_estimators_against_the_exact_kl(seed: int, size: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits_V, reference_V = torch.randn(2, size, generator=generator, dtype=torch.float64)
    value, towards = kl(logits_V, reference_V, forward=True)
    _, reverse = kl(logits_V, reference_V, forward=False)
    gradients = {"k1": torch.zeros_like(towards), "k2": towards, "k3": reverse}
    for estimator in ESTIMATORS:
        mean, gradient = exact(logits_V, reference_V, estimator)
        torch.testing.assert_close(gradient, gradients[estimator], rtol=1e-9, atol=1e-12)
        if estimator != "k2":  # the only biased one
            torch.testing.assert_close(mean, value, rtol=1e-9, atol=1e-12)


@given(batch=BATCHES, estimator=st.sampled_from(ESTIMATORS))
@settings(max_examples=20, deadline=None)
def test_both_are_means_over_tokens_then_sequences(batch: Batch, estimator: Any) -> None:
    for base in (TBPOConfig(), DAPOConfig()):
        plain, _, metrics = run(batch, base)
        loss, _, with_both = run(batch, base.model_copy(update={**BOTH, "kl_estimator": estimator}))
        kls, entropies = [], []
        for b, mask_T in enumerate(batch.mask_BT):
            d_T = (batch.samp_BT - batch.theta_BT)[b, mask_T]
            kls.append(kl_penalty(d_T, estimator).mean().item())
            entropies.append(batch.theta_BT[b, mask_T].square().mean().item())
        expected = plain.item() + 0.3 * sum(kls) / len(kls) - 0.2 * sum(entropies) / len(entropies)
        assert loss.item() == pytest.approx(expected, rel=1e-9, abs=1e-12)
        assert with_both["actor/kl_loss"] == pytest.approx(sum(kls) / len(kls), rel=1e-9, abs=1e-12)
        everything = batch.theta_BT[batch.mask_BT].square()
        assert metrics["actor/entropy"] == pytest.approx(everything.mean().item(), rel=1e-9)


@given(batch=BATCHES, junk=st.sampled_from([math.nan, math.inf, 1e300]), size=st.integers(1, 3))
@settings(max_examples=20, deadline=None)
def test_masks_and_splits_do_not_matter(batch: Batch, junk: float, size: int) -> None:
    config = GRPOConfig(**BOTH)
    loss, grad_BT, _ = run(batch, config)
    dirty = Batch(
        *(t.masked_fill(~batch.mask_BT, junk) for t in (batch.theta_BT, batch.prox_BT, batch.samp_BT)),
        batch.mask_BT,
        batch.advantage_B,
    )
    dirty_loss, dirty_grad_BT, _ = run(dirty, config)
    torch.testing.assert_close(dirty_loss, loss, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(dirty_grad_BT[batch.mask_BT], grad_BT[batch.mask_BT], rtol=1e-12, atol=1e-14)
    rows = range(len(batch.advantage_B))
    parts = [run(batch.pick(rows[i : i + size]), config, whole=batch) for i in rows[::size]]
    torch.testing.assert_close(torch.stack([part[0] for part in parts]).sum(), loss, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(torch.cat([part[1] for part in parts]), grad_BT, rtol=1e-9, atol=1e-12)


def test_metrics_alone_leave_every_bit_of_the_loss() -> None:
    batch = random_batch(0, 4, 6, 0.1, dtype=torch.float32)
    plain, plain_grad_BT, _ = batch.run(TBPOConfig())
    loss, grad_BT, metrics = run(batch, TBPOConfig())
    assert torch.equal(loss, plain)
    assert torch.equal(grad_BT, plain_grad_BT)
    assert "actor/entropy" in metrics


def test_a_broken_reference_is_an_error_that_names_the_sequences() -> None:
    batch = random_batch(0, 3, 2, 0.1, full=True)
    inputs = with_extras(batch)
    assert inputs.logp_ref_BT is not None
    inputs.logp_ref_BT[1, 0] = math.nan
    with pytest.raises(ObjectiveError, match=r"infinite log-prob in sequences \[1\]") as caught:
        # the sampler shares the tensor: give it another
        compute_loss(LossInputs(**{**vars(inputs), "logp_samp_BT": batch.prox_BT}), GRPOConfig(**BOTH))
    assert isinstance(caught.value, DivergenceError)

"""One rule at a time back to transformers, and a quantized layer one step at a time in float32."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from qarl.numerics import processor
from qarl.numerics.revert import RULES, Rule, revert_rule
from qarl.quant.formats import format_of
from qarl.quant.linear import align_linears
from qarl.quant.reference import use_reference
from qarl.quant.scheme import QuantScheme
from tests.support.numerics_models import KINDS, batch, log_probs, portable, tiny_model

DTYPES = (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "qwen3_moe"])  # experts keep the engine's rounding
@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_all_rules_reverted_are_transformers_bit_for_bit(kind: str, dtype: torch.dtype) -> None:
    ours = portable(tiny_model(kind)).to(dtype)
    for rule in RULES:
        revert_rule(ours, rule)
    theirs = tiny_model(kind).to(dtype)
    theirs.model.rotary_emb = type(theirs.model.rotary_emb)(theirs.config)  # the cast took its float32 frequencies
    ids_BT, lengths = batch()
    for row, length in enumerate(lengths):  # one by one: a GEMM may round a token otherwise in another batch
        one = ids_BT[row : row + 1, :length], [length]
        assert torch.equal(log_probs(ours, *one), log_probs(theirs, *one))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_one_rule_changes_the_rounding_and_no_more(rule: Rule, dtype: torch.dtype) -> None:
    reverted, kept = (portable(tiny_model("qwen3")).to(dtype) for _ in range(2))
    revert_rule(reverted, rule)
    gap = (log_probs(reverted, *batch()) - log_probs(kept, *batch())).abs().max().item()
    if rule == "norm" and dtype == torch.float32:
        assert gap == 0.0  # float32 sums are their own rounding
    elif rule == "rope" and dtype == torch.float32 and not processor.has_avx512():
        assert gap == 0.0  # the engine's rounds each product there, as transformers does
    elif not (rule == "attention" and dtype == torch.float32):  # the same op there
        assert 0.0 < gap < (1e-4 if dtype == torch.float32 else 0.5)


def layer(scheme: QuantScheme, grids: tuple[bool, bool] | None, bias: bool = True) -> nn.Module:
    """An aligned linear in its kernel (grids None) or taken apart."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32, bias=bias), nn.Linear(32, 32)).bfloat16()
    align_linears(model, replace(scheme, ignore=("1",)), "torch")
    if grids is not None:
        use_reference(model, scheme, *grids)
    return model[0]


SCHEMES = [QuantScheme("w8a8_int8"), QuantScheme("w4a16", group_size=32), QuantScheme("w4a8", group_size=32)]
X = torch.randn(3, 5, 64, generator=torch.manual_seed(1)).bfloat16()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.label)
@torch.no_grad()
def test_reference_off_both_grids_is_the_plain_layer(scheme: QuantScheme, bias: bool) -> None:
    linear = layer(scheme, (False, False), bias)
    bias_N = None if linear.bias is None else linear.bias.float()
    assert torch.equal(linear(X), nn.functional.linear(X.float(), linear.weight.float(), bias_N).bfloat16())


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.label)
@torch.no_grad()
def test_reference_on_both_grids_is_the_kernel_but_for_its_sums(scheme: QuantScheme) -> None:
    reference, kernel = layer(scheme, (True, True)), layer(scheme, None)
    torch.testing.assert_close(reference(X), kernel(X), rtol=2e-2, atol=2e-2)  # bfloat16 holds 8 bits


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.label)
@pytest.mark.parametrize("grids", [(True, False), (False, True), (True, True)])
@torch.no_grad()
def test_each_operand_goes_to_its_grid_by_itself(scheme: QuantScheme, grids: tuple[bool, bool]) -> None:
    format_, linear = format_of(scheme), layer(scheme, grids, bias=False)
    x, weight = X.flatten(0, 1), linear.weight.detach()
    weight = format_.dequantize(format_.quantize(weight)) if grids[0] else weight
    x = format_.round_activation(x) if grids[1] else x
    exact = x.double() @ weight.double().t()
    torch.testing.assert_close(linear(X).flatten(0, 1).double(), exact, rtol=5e-3, atol=1e-5)


@torch.no_grad()
def test_a_weight_only_format_leaves_activations_alone() -> None:
    scheme = SCHEMES[1]
    assert torch.equal(layer(scheme, (True, False))(X), layer(scheme, (True, True))(X))

"""Which updates move low-bit codes: counted against the quantizer itself, in every format."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qarl.metrics import merge
from qarl.quant.changes import CodeChanges
from qarl.quant.format import Format
from qarl.quant.formats import FORMATS
from qarl.quant.int8 import quantize_weight
from qarl.quant.linear import align_linears, requantize
from qarl.quant.scheme import QuantScheme
from tests.support.numerics_models import tiny_model

N, K = 128, 256


def weight_with_equal_scales() -> Tensor:
    """Every group of 16 weights has the same largest magnitude, which `moved` keeps."""
    torch.manual_seed(0)
    weight_NK = (torch.rand(N, K) - 0.5) * 8
    weight_NK[:, ::16] = 8.0
    return weight_NK


def moved(format_: Format, weight_NK: Tensor, steps: float) -> Tensor:
    """Weights on the grid, moved away from zero by so many distances to the next value; the largest stay."""
    quantized = format_.quantize(weight_NK)
    value_NK = format_.dequantize(quantized)
    signs_NK = torch.where(value_NK < 0, -1.0, 1.0)
    result_NK = value_NK + signs_NK * steps * format_.steps(quantized, N, 1)
    result_NK[:, ::16] = weight_NK[:, ::16]
    return result_NK


def differing(format_: Format, one: Tensor, other: Tensor) -> int:
    return format_.differing(*(format_.codes(format_.quantize(weight)) for weight in (one, other)))


@pytest.mark.parametrize("name", FORMATS)
def test_half_a_step_is_what_a_code_needs_to_move(name: str) -> None:
    format_ = FORMATS[name]  # type: ignore[index]
    weight_NK = weight_with_equal_scales()
    on_grid = moved(format_, weight_NK, 0.0)
    assert differing(format_, on_grid, moved(format_, weight_NK, 0.49)) == 0
    assert differing(format_, on_grid, moved(format_, weight_NK, 0.51)) == N * K * 15 // 16


@pytest.mark.parametrize("name", FORMATS)
def test_single_codes_are_counted(name: str) -> None:
    format_ = FORMATS[name]  # type: ignore[index]
    weight_NK = weight_with_equal_scales()
    changed = weight_NK.clone()
    changed[3, 5:9] = -torch.sign(changed[3, 5:9]) * 3.9  # two are packed into a byte in int4 and fp4
    assert differing(format_, weight_NK, changed) == 4


@pytest.mark.parametrize("name", FORMATS)
def test_rows_at_a_distance_have_the_steps_of_the_whole(name: str) -> None:
    format_ = FORMATS[name]  # type: ignore[index]
    weight_NK = weight_with_equal_scales() * torch.logspace(0, 3, N)[:, None]
    quantized = format_.quantize(weight_NK)
    whole = format_.steps(quantized, N, 1).expand(N, K)
    assert torch.equal(format_.steps(quantized, N, 5).expand(-1, K), whole[::5])


def test_shares_of_an_update_and_how_ranks_divide_them() -> None:
    model = nn.Sequential(*(nn.Linear(64, 32, bias=False) for _ in range(3)))
    align_linears(model, QuantScheme(ignore=()))
    both = [CodeChanges(model, rank=rank, ranks=2) for rank in (0, 1)]
    alone = CodeChanges(model)
    before = [layer.weight.detach().clone() for layer in model]
    torch.manual_seed(0)
    with torch.no_grad():
        for layer, size in zip(model, (0.0, 5e-4, 1e-2), strict=True):
            layer.weight += size * torch.randn_like(layer.weight)
    requantize(model)
    changed = below = 0
    for layer, old in zip(model, before, strict=True):
        codes, scale_N1 = quantize_weight(layer.weight)
        changed += int((codes != quantize_weight(old)[0]).sum())
        below += int(((layer.weight - old).abs() < scale_N1 / 2).sum())
    metrics = merge([alone.metrics()])
    assert metrics == {"quant/codes_changed": changed / 6144, "quant/update_below_grid": below / 6144}
    assert 0.3 < metrics["quant/codes_changed"] < 0.7
    assert 0.5 < metrics["quant/update_below_grid"] < 0.9
    assert merge(part.metrics() for part in both) == metrics


def test_experts_count_and_dense_layers_do_not() -> None:
    model = tiny_model("qwen3_moe")
    align_linears(model, QuantScheme(ignore=("re:.*self_attn.*", "lm_head")))
    changes = CodeChanges(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.neg_()
    requantize(model)
    metrics = merge([changes.metrics()])
    assert metrics["quant/codes_changed"] > 0.98
    assert merge([CodeChanges(model.model.norm).metrics()]) == {}

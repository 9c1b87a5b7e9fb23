"""The portable profile on CUDA: each rounding against the CPU's, whole models against float64 and bfloat16 there.

Suffixes: B sequences, T tokens, H heads, D head width, V vocabulary.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from qarl.errors import KernelError
from qarl.numerics.flat import flat_rows
from qarl.numerics.layers import BatchLayout, Norm, Rotate, causal_attention, hidden_states
from qarl.numerics.profile import apply_profile
from qarl.quant.linear import align_linears
from qarl.quant.scheme import QuantScheme

pytestmark = pytest.mark.gpu

CPU = torch.device("cpu")
KINDS = ("qwen3", "qwen2", "llama")
LENGTHS = [40, 25, 3]


def tiny_model(kind: str) -> Any:
    torch.manual_seed(0)
    shape = {
        "hidden_size": 128,
        "intermediate_size": 256,
        "vocab_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "initializer_range": 0.1,
    }
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **shape))
    for parameter in model.parameters():
        if parameter.ndim == 1:  # norms start at one and biases at zero: neither would be tested
            nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def portable(model: Any, device: torch.device) -> Any:
    model = copy.deepcopy(model).to(device)
    apply_profile(model, "portable", device)
    return model


def log_probs(model: Any) -> Tensor:
    """Log-probs of the next token, of all real tokens: float64 [N, V] on CPU."""
    device = model.lm_head.weight.device
    ids_BT = torch.randint(0, 96, (len(LENGTHS), 40), generator=torch.manual_seed(1))
    real_BT = torch.arange(40) < torch.tensor(LENGTHS)[:, None]
    if isinstance(model.model.norm, Norm):
        rows = flat_rows([(row,) for row in range(len(LENGTHS))], [length - 1 for length in LENGTHS])
        layout = BatchLayout(rows, paged=False, device=device)
        hidden_NE = hidden_states(model.model, ids_BT[real_BT].to(device), layout)
    else:
        mask_BT = real_BT.to(device)
        hidden_NE = model.model(input_ids=ids_BT.to(device), use_cache=False, attention_mask=mask_BT)[0][mask_BT]
    return torch.log_softmax(model.lm_head(hidden_NE).double(), -1).cpu()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotation_is_the_cpus_bit_for_bit(dtype: torch.dtype, cuda: torch.device) -> None:
    generator = torch.manual_seed(0)
    x_BTHD, angle_BTD = torch.randn(2, 50, 4, 64, generator=generator).to(dtype), torch.rand(2, 50, 32) * 100
    cos_BTD, sin_BTD = angle_BTD.cos().to(dtype), angle_BTD.sin().to(dtype)
    ours = Rotate.apply(*(t.to(cuda) for t in (x_BTHD, cos_BTD, sin_BTD)))
    assert torch.equal(ours.cpu(), Rotate.apply(x_BTHD, cos_BTD, sin_BTD))


@pytest.mark.parametrize("length", [1, 33, 700])
def test_attention_rounds_the_exact_value_once(length: int, cuda: torch.device) -> None:
    generator = torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, length, 64, generator=generator).bfloat16() for heads in (4, 2, 2))
    ours = causal_attention(*(t.to(cuda) for t in (q, k, v)), 0.125).cpu()
    exact = nn.functional.scaled_dot_product_attention(
        q.double(), *(t.double().repeat_interleave(2, 1) for t in (k, v)), is_causal=True, scale=0.125
    )
    assert (ours != exact.float().bfloat16()).float().mean() < 0.01  # float32 seldom crosses a rounding boundary


@pytest.mark.parametrize("kind", KINDS)
def test_float32_model_is_transformers_in_float64(kind: str, cuda: torch.device) -> None:
    model = tiny_model(kind)
    expected = log_probs(copy.deepcopy(model).double())
    assert expected.std() > 0.5  # a flat model would hide differences
    ours = portable(model, cuda)
    logp = log_probs(ours)
    torch.testing.assert_close(logp, expected, rtol=0, atol=1e-4)
    logp.square().sum().backward()
    double = copy.deepcopy(model).double()
    log_probs(double).square().sum().backward()
    for (name, grad), want in zip(ours.named_parameters(), double.parameters(), strict=True):
        assert (grad.grad.cpu().double() - want.grad).abs().max() < 1e-3 * want.grad.abs().max(), name


@pytest.mark.parametrize("scheme", [QuantScheme("none"), QuantScheme("w8a8_int8")], ids=lambda scheme: scheme.name)
@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_model_is_nearer_to_the_cpus_than_stock_is(kind: str, scheme: QuantScheme, cuda: torch.device) -> None:
    """Both profiles on CUDA against the portable one on CPU: the roundings are shared, not the order of sums."""
    model = tiny_model(kind).bfloat16()
    models = [copy.deepcopy(model) for _ in range(3)]
    for one, device in zip(models, (CPU, cuda, cuda), strict=True):
        align_linears(one.to(device), scheme, "torch")
    with torch.no_grad():
        expected = log_probs(portable(models[0], CPU))
        ours, stock = log_probs(portable(models[1], cuda)), log_probs(models[2])
    gap, stock_gap = (ours - expected).abs().mean(), (stock - expected).abs().mean()
    assert gap < 0.05
    assert gap < stock_gap


def test_engine_numerics_are_refused(cuda: torch.device) -> None:
    with pytest.raises(KernelError, match=r"runs on CPU, not on cuda; set learner\.numerics=portable"):
        apply_profile(tiny_model("qwen3").to(cuda), "engine", cuda)

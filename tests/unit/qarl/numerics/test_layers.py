"""The portable numerics: each module against its plain definition in float64, whole models against transformers.

Suffixes: B sequences, T tokens, E model width, H query heads, G key/value heads, D head width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qarl.errors import KernelError, ModelError
from qarl.numerics import processor
from qarl.numerics.flat import Row, flat_rows
from qarl.numerics.layers import BatchLayout, DecoderLayer, Norm, Rotary, Rotate, attend, causal_attention
from qarl.numerics.processor import cut_off, round_as_engine
from qarl.numerics.profile import apply_profile
from tests.support.numerics_models import KINDS, batch, groups, layout, log_probs, portable, tiny_model

CPU = torch.device("cpu")
# A sum of some tens of float32 products of order one: relative errors of 2^-24 each.
FLOAT32: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}


Sequences = tuple[Tensor, list[int]] | tuple[Tensor, list[int], int]


def gradients(model: Any, sequences: Sequences | None = None) -> dict[str, Tensor]:
    model.zero_grad()
    logp_N = log_probs(model, *(sequences or batch()))
    (logp_N * torch.linspace(-1, 1, len(logp_N))).sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_gradients(call: Callable[..., Tensor], exact: Callable[..., Tensor], inputs: list[Tensor]) -> None:
    """Values and gradients of `call` in float32 against those of `exact` in float64."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    doubles = [t.detach().double().requires_grad_() for t in inputs]
    out, expected = call(*leaves), exact(*doubles)
    torch.testing.assert_close(out.double(), expected, **FLOAT32)
    upstream = torch.randn(out.shape, generator=torch.manual_seed(9))
    grads = torch.autograd.grad(out, leaves, upstream)
    for grad, want in zip(grads, torch.autograd.grad(expected, doubles, upstream.double()), strict=True):
        torch.testing.assert_close(grad.double(), want, **FLOAT32)


# Norm


def test_norm_and_its_gradient() -> None:
    generator = torch.manual_seed(0)
    x, weight = torch.randn(3, 4, 16, generator=generator), torch.randn(16, generator=generator)
    norm = Norm(SimpleNamespace(weight=nn.Parameter(weight), variance_epsilon=1e-3))

    def call(x: Tensor, weight: Tensor) -> Tensor:
        return torch.func.functional_call(norm, {"weight": weight}, (x,))

    def exact(x: Tensor, weight: Tensor) -> Tensor:
        return weight * x / (x.pow(2).mean(-1, keepdim=True) + 1e-3).sqrt()

    assert_gradients(call, exact, [x, weight])


def test_norm_takes_the_unrounded_sum() -> None:
    generator = torch.manual_seed(0)
    weight = torch.randn(64, generator=generator).bfloat16()
    norm = Norm(SimpleNamespace(weight=nn.Parameter(weight), variance_epsilon=1e-6))
    x = torch.randn(40, 64, generator=generator)
    out = norm(x)
    exact = x.double() / (x.double().pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    assert out.dtype == torch.bfloat16
    # float32 on the way moves a value over bfloat16's rounding boundary in about one of 2^14 cases.
    assert (out != weight * exact.to(torch.bfloat16)).float().mean() < 0.005
    assert (norm(x.bfloat16()) != out).float().mean() > 0.1


# Rotary embedding


def plain_rotation(x_BTHD: Tensor, cos_BTD: Tensor, sin_BTD: Tensor) -> Tensor:
    cos, sin = cos_BTD.to(x_BTHD.dtype).unsqueeze(2), sin_BTD.to(x_BTHD.dtype).unsqueeze(2)
    x1, x2 = x_BTHD.chunk(2, -1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), -1)


def angles(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.manual_seed(2)
    angle_BTD = 6.28 * torch.rand(2, 5, 4, generator=generator)
    return angle_BTD.cos().to(dtype), angle_BTD.sin().to(dtype)


def test_rotation_and_its_gradient() -> None:
    cos_BTD, sin_BTD = angles(torch.float32)
    x_BTHD = torch.randn(2, 5, 3, 8, generator=torch.manual_seed(0))
    assert_gradients(
        lambda x: Rotate.apply(x, cos_BTD, sin_BTD), lambda x: plain_rotation(x, cos_BTD, sin_BTD), [x_BTHD]
    )


def test_backward_is_the_inverse_rotation() -> None:
    cos_BTD, sin_BTD = angles(torch.float32)
    x_BTHD = torch.randn(2, 5, 3, 8, requires_grad=True)
    out = Rotate.apply(x_BTHD, cos_BTD, sin_BTD)
    (back,) = torch.autograd.grad(out, x_BTHD, out.detach())
    torch.testing.assert_close(back, x_BTHD.detach(), **FLOAT32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotation_rounds_as_documented(dtype: torch.dtype) -> None:
    cos_BTD, sin_BTD = angles(dtype)
    x_BTHD = torch.randn(2, 5, 3, 8, generator=torch.manual_seed(0)).to(dtype)
    out = Rotate.apply(x_BTHD, cos_BTD, sin_BTD)
    for b, t, h, d in torch.cartesian_prod(*map(torch.arange, (2, 5, 3, 4))).tolist():
        cos, sin = cos_BTD[b, t, d].float(), sin_BTD[b, t, d].item()
        for part, other, sign in ((d, d + 4, -1), (d + 4, d, 1)):
            rounded = (x_BTHD[b, t, h, part].float() * cos).item()
            second = x_BTHD[b, t, h, other].item() * sin  # Python floats are float64
            if not processor.has_avx512():
                second = torch.tensor(second, dtype=torch.float32).item()
            exact = torch.tensor(rounded + sign * second, dtype=torch.float32)
            assert out[b, t, h, part] == round_as_engine(exact, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_angles_are_float32_whatever_the_model(dtype: torch.dtype) -> None:
    stock = tiny_model("llama").model.rotary_emb
    positions = torch.arange(1000)[None]
    cos, sin = Rotary(stock)(torch.zeros(1, dtype=dtype), positions)
    angle = positions[..., None].double() * stock.inv_freq.double()
    assert cos.dtype == sin.dtype == dtype
    assert cos.shape == (1, 1000, 4)
    # float32 angles up to 1000 are known to 3e-5.
    tolerance = 5e-5 if dtype == torch.float32 else 4e-3
    torch.testing.assert_close(cos.double(), angle.cos(), rtol=0, atol=tolerance)
    torch.testing.assert_close(sin.double(), angle.sin(), rtol=0, atol=tolerance)


def test_scaled_rotary_embedding() -> None:
    rope = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 64}
    stock = tiny_model("qwen3", rope_parameters=rope, max_position_embeddings=256).model.rotary_emb
    x, positions = torch.zeros(1), torch.arange(200)[None]
    assert stock.attention_scaling != 1.0
    for ours, theirs in zip(Rotary(stock)(x, positions), stock(x, positions), strict=True):
        torch.testing.assert_close(ours, theirs[..., :4], rtol=0, atol=0)


def test_casting_the_model_leaves_the_frequencies() -> None:
    model = tiny_model("qwen3")
    frequencies = model.model.rotary_emb.inv_freq.clone()
    portable(model).bfloat16().to("cpu")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.equal(model.model.rotary_emb.inv_freq, frequencies)


# Attention


def plain_attention(q_BHTD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor) -> Tensor:
    groups, length = q_BHTD.shape[1] // k_BGTD.shape[1], q_BHTD.shape[2]
    k, v = k_BGTD.repeat_interleave(groups, 1), v_BGTD.repeat_interleave(groups, 1)
    scores = 0.3 * q_BHTD @ k.transpose(-1, -2)
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    return scores.masked_fill(future, -math.inf).softmax(-1) @ v


def heads(length: int) -> list[Tensor]:
    """q [2, 4, T, 8], k and v [2, 2, T, 8]."""
    generator = torch.manual_seed(4)
    return [torch.randn(2, count, length, 8, generator=generator) for count in (4, 2, 2)]


@pytest.mark.parametrize("length", [1, 9])
def test_attention_and_its_gradient(length: int) -> None:
    assert_gradients(lambda q, k, v: causal_attention(q, k, v, 0.3), plain_attention, heads(length))


def test_attention_rounds_once() -> None:
    q, k, v = (t.bfloat16() for t in heads(9))
    out = causal_attention(q, k, v, 0.3)
    exact = plain_attention(q.double(), k.double(), v.double())
    exact = exact.to(torch.bfloat16) if processor.has_avx512() else cut_off(exact.float(), torch.bfloat16)
    assert out.dtype == torch.bfloat16
    assert (out != exact).float().mean() < 0.01  # float32 on the way seldom moves a value over a rounding boundary


class TorchPages:
    """Stands in for the engine's paged view: attends to each row by the plain definition."""

    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows

    def attend(self, q_NHD: Tensor, k_NGD: Tensor, v_NGD: Tensor, scale: float) -> Tensor:
        assert scale == 0.3
        out = torch.empty_like(q_NHD)
        for row in self.rows:
            q, k, v = (t[row.tokens()].transpose(0, 1)[None] for t in (q_NHD, k_NGD, v_NGD))
            out[row.tokens()] = plain_attention(q, k, v)[0].transpose(0, 1)
        return out


@pytest.mark.parametrize("paged", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flat_attention_and_its_gradient(dtype: torch.dtype, paged: bool) -> None:
    """Two responses share a prompt of 4 tokens, whose gradients add up; a third has a prompt of its own."""
    rows = flat_rows([(1, 2, 3, 4), (1, 2, 3, 4), (5,)], [3, 0, 8])
    layout: Any = BatchLayout(rows, paged=False)
    if paged:
        layout.paged = TorchPages(rows)
    generator = torch.manual_seed(4)
    leaves = [torch.randn(16, count, 8, generator=generator).to(dtype).requires_grad_() for count in (4, 2, 2)]
    doubles = [t.detach().double().requires_grad_() for t in leaves]
    out, expected = attend(*leaves, 0.3, layout), TorchPages(rows).attend(*doubles, 0.3)
    assert out.dtype == dtype
    # Past its upstream gradient, bfloat16 rounds each result once: a relative error of 2^-9.
    tolerance = FLOAT32 if dtype == torch.float32 else {"rtol": 2**-8, "atol": 1e-2}
    torch.testing.assert_close(out.double(), expected, **tolerance)
    upstream = torch.randn(out.shape, generator=generator).to(dtype)
    grads = torch.autograd.grad(out, leaves, upstream)
    for grad, want in zip(grads, torch.autograd.grad(expected, doubles, upstream.double()), strict=True):
        assert grad.dtype == dtype
        torch.testing.assert_close(grad.double(), want, **tolerance)


# Whole models


@pytest.mark.parametrize("sequences", [batch(), groups()], ids=["alone", "sharing prompts"])
@pytest.mark.parametrize("kind", KINDS)
def test_model_is_transformers_to_float32(kind: str, sequences: Sequences) -> None:
    stock, ours = tiny_model(kind), portable(tiny_model(kind))
    assert all(isinstance(layer, DecoderLayer) for layer in ours.model.layers)
    expected = log_probs(stock, *sequences)
    assert expected.std() > 0.5  # a flat model would hide differences
    # The same float32 operations, some in another order.
    torch.testing.assert_close(log_probs(ours, *sequences), expected, rtol=0, atol=1e-4)
    expected_grads, grads = gradients(stock, sequences), gradients(ours, sequences)
    assert grads.keys() == expected_grads.keys()
    for name, grad in grads.items():
        size = expected_grads[name].abs().max()
        assert size > 0, name
        assert (grad - expected_grads[name]).abs().max() < 1e-4 * size, name


@pytest.mark.parametrize("kind", KINDS)
def test_neighbours_never_matter(kind: str) -> None:
    model = portable(tiny_model(kind))
    ids_BT, lengths = batch()
    logp_N = log_probs(model, ids_BT, lengths)
    alone = [log_probs(model, ids_BT[row : row + 1, :length], [length]) for row, length in enumerate(lengths)]
    torch.testing.assert_close(torch.cat(alone), logp_N, **FLOAT32)  # other shapes sum in another order


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_gives_the_same_gradients(kind: str) -> None:
    model = portable(tiny_model(kind))
    expected, calls = gradients(model), []
    model.model.layers[0].input_layernorm.register_forward_hook(lambda *_: calls.append(1))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    grads = gradients(model)
    assert len(calls) == 2  # computed again in the backward
    assert all(torch.equal(grads[name], expected[name]) for name in expected)


def test_norms_of_a_bfloat16_model_see_the_unrounded_sum() -> None:
    model = portable(tiny_model("qwen3").bfloat16())
    seen: list[Tensor] = []
    layers = model.model.layers
    norms = [layer.post_attention_layernorm for layer in layers] + [layers[1].input_layernorm, model.model.norm]
    for norm in norms:
        norm.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    logp_N = log_probs(model, *batch())
    assert logp_N.isfinite().all()
    assert len(seen) == len(norms)
    for total in seen:
        assert total.dtype == torch.float32
        assert (total != total.bfloat16()).float().mean() > 0.3


def test_only_the_carried_residual_is_rounded() -> None:
    model = portable(tiny_model("qwen3").bfloat16())
    layer, hidden_NE = model.model.layers[0], torch.randn(10, 32, generator=torch.manual_seed(0))
    context = {
        "position_embeddings": model.model.rotary_emb(hidden_NE.bfloat16(), torch.arange(10)),
        "layout": layout([5, 5]),
    }
    nn.init.zeros_(layer.mlp.down_proj.weight)
    out_NE = layer(hidden_NE, **context)
    assert torch.equal(out_NE, out_NE.bfloat16().float())
    nn.init.zeros_(layer.self_attn.o_proj.weight)
    seen: list[Tensor] = []
    layer.post_attention_layernorm.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    assert torch.equal(layer(hidden_NE, **context), hidden_NE.bfloat16().float())
    assert torch.equal(seen[0], hidden_NE.bfloat16().float())


def test_parameters_keep_their_names() -> None:
    for kind in KINDS:
        model = tiny_model(kind)
        before = dict(model.named_parameters())
        after = dict(portable(model).named_parameters())
        assert after.keys() == before.keys()
        assert all(after[name] is before[name] for name in before)


def test_stock_changes_nothing() -> None:
    model = tiny_model("llama")
    modules = list(model.modules())
    apply_profile(model, "stock", CPU)
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))


def test_unsupported_models() -> None:
    with pytest.raises(
        ModelError, match=r"covers llama, qwen2, qwen3, qwen3_moe, not gpt_neox; set learner\.numerics=stock"
    ):
        portable(tiny_model("gpt_neox"))
    sliding = tiny_model("qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=1)
    with pytest.raises(ModelError, match="does not cover sliding-window attention"):
        portable(sliding)
    dynamic = tiny_model("llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0})
    with pytest.raises(ModelError, match="does not cover 'dynamic' RoPE"):
        portable(dynamic)


def test_engine_numerics_need_a_cpu() -> None:
    with pytest.raises(KernelError, match=r"runs on CPU, not on cuda; set learner\.numerics=portable"):
        apply_profile(tiny_model("qwen3"), "engine", torch.device("cuda"))

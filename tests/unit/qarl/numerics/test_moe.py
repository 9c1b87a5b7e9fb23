"""Experts and router: against plain definitions in float64, against the engine's op, and their way to a checkpoint.

Suffixes: N tokens, X experts, K of them for a token, E model width, I inner width.
"""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compressed_tensors.utils.match import match_name
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from qarl.errors import ConfigError, KernelError
from qarl.numerics import engine_ops, processor
from qarl.numerics.moe import Experts, Router, SparseMoe
from qarl.quant.experts import QuantizedExperts, check_engine
from qarl.quant.formats import format_of, quantization_config
from qarl.quant.linear import QuantizedLinear, align_linears, requantize
from qarl.quant.publish import checkpoint_tensors, publish, write_checkpoint
from qarl.quant.reference import use_reference
from qarl.quant.scheme import KernelKind, QuantScheme, SchemeName
from qarl.weights.wire import unpack
from tests.support.hosts import needs_avx512

EXPERTS, CHOSEN, WIDTH, INNER = 4, 2, 64, 32
W8A8, PLAIN = QuantScheme(), QuantScheme("none")
FORMATS = [W8A8, QuantScheme("w4a16", group_size=32), QuantScheme("w4a8", group_size=32), QuantScheme("fp8_channel")]
needs_vllm = pytest.mark.skipif(not engine_ops.available(), reason="vLLM is not installed")


def stack(dtype: torch.dtype) -> Any:
    generator = torch.manual_seed(0)
    gate_up = torch.randn(EXPERTS, 2 * INNER, WIDTH, generator=generator) * WIDTH**-0.5
    down = torch.randn(EXPERTS, WIDTH, INNER, generator=generator) * INNER**-0.5
    return SimpleNamespace(gate_up_proj=nn.Parameter(gate_up.to(dtype)), down_proj=nn.Parameter(down.to(dtype)))


def block(renormalize: bool, dtype: torch.dtype = torch.float32) -> SparseMoe:
    gate = torch.randn(EXPERTS, WIDTH, generator=torch.manual_seed(1)) * WIDTH**-0.5
    router = SimpleNamespace(weight=nn.Parameter(gate.to(dtype)), top_k=CHOSEN, norm_topk_prob=renormalize)
    return SparseMoe(SimpleNamespace(gate=router, experts=stack(dtype)), engine=False)


def tokens(count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x [N, E], ids [N, K], weights [N, K]."""
    x_NE = torch.randn(count, WIDTH, generator=torch.manual_seed(2)).to(dtype)
    ids_NK = torch.rand(count, EXPERTS).topk(CHOSEN).indices
    return x_NE, ids_NK, torch.rand(count, CHOSEN).softmax(-1)


def quantized(scheme: QuantScheme, kind: KernelKind, dtype: torch.dtype = torch.bfloat16) -> QuantizedExperts:
    return QuantizedExperts(stack(dtype), "experts", scheme, kind)


def plain_block(renormalize: bool, x_NE: Tensor, router: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Every expert on every token, weighted by its probability; zero for those that were not chosen."""
    prob_NX = (x_NE @ router.t()).softmax(-1)
    threshold_N1 = prob_NX.topk(CHOSEN).values[:, -1:]
    prob_NX = torch.where(prob_NX >= threshold_N1, prob_NX, 0)
    if renormalize:
        prob_NX = prob_NX / prob_NX.sum(-1, keepdim=True)
    gate_NXI, up_NXI = torch.einsum("ne,xfe->nxf", x_NE, gate_up).chunk(2, -1)
    return torch.einsum("nx,nxi,xei->ne", prob_NX, F.silu(gate_NXI) * up_NXI, down)


@pytest.mark.parametrize("renormalize", [True, False])
def test_block_and_all_its_gradients_are_the_plain_definitions(renormalize: bool) -> None:
    moe = block(renormalize)
    x_NE = torch.randn(12, WIDTH, generator=torch.manual_seed(3)).requires_grad_()
    leaves = [x_NE, moe.gate.weight, moe.experts.gate_up_proj, moe.experts.down_proj]
    doubles = [leaf.detach().double().requires_grad_() for leaf in leaves]
    out_NE, expected_NE = moe(x_NE), plain_block(renormalize, *doubles)
    torch.testing.assert_close(out_NE.double(), expected_NE, rtol=1e-5, atol=1e-5)
    upstream = torch.randn(out_NE.shape, generator=torch.manual_seed(4))
    grads = torch.autograd.grad(out_NE, leaves, upstream)
    wanted = torch.autograd.grad(expected_NE, doubles, upstream.double())
    for grad, want in zip(grads, wanted, strict=True):
        assert want.abs().max() > 1e-2
        torch.testing.assert_close(grad.double(), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("renormalize", [True, False])
def test_weights_are_rounded_to_the_models_dtype_as_the_engine_does(renormalize: bool) -> None:
    router = block(renormalize, torch.bfloat16).gate
    ids_NK, weights_NK = router(torch.randn(50, WIDTH).bfloat16())
    assert weights_NK.dtype == torch.float32
    assert torch.equal(weights_NK, weights_NK.bfloat16().float())
    assert all(len(set(row)) == CHOSEN for row in ids_NK.tolist())
    total_N = weights_NK.sum(-1)
    assert (total_N - 1).abs().max() < 2**-7 if renormalize else total_N.max() < 1


def test_only_the_inputs_are_saved() -> None:
    experts, saved = Experts(stack(torch.bfloat16), engine=False), []
    x_NE, ids_NK, weights_NK = tokens(10, torch.bfloat16)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t.nbytes), t)[1], lambda t: t):
        experts(x_NE.requires_grad_(), ids_NK, weights_NK)
    assert sum(saved) == sum(t.nbytes for t in (x_NE, ids_NK, weights_NK, *experts.parameters()))


# The engine's op


@needs_vllm
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_engines_op_computes_the_same_and_differentiates_alike(dtype: torch.dtype) -> None:
    inputs = tokens(40, dtype)
    engine, torch_ = (Experts(stack(dtype), engine=flag) for flag in (True, False))
    out_NE, expected_NE = engine(*inputs), torch_(*inputs)
    # bfloat16 rounds the same sums, up to the order of a float32 sum; in float32 that order shows.
    differing = (out_NE != expected_NE).float().mean()
    assert differing < 1e-2 if dtype == torch.bfloat16 else (out_NE - expected_NE).abs().max() < 1e-5
    upstream = torch.randn(40, WIDTH).to(dtype)
    for out, experts in ((out_NE, engine), (expected_NE, torch_)):
        out.backward(upstream)
        assert experts.gate_up_proj.grad is not None
    for name in ("gate_up_proj", "down_proj"):
        assert torch.equal(getattr(engine, name).grad, getattr(torch_, name).grad)


@needs_vllm
@pytest.mark.parametrize("low_bit", [False, pytest.param(True, marks=needs_avx512)])
def test_a_token_has_one_value_in_any_batch(low_bit: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    experts = quantized(W8A8, "engine") if low_bit else Experts(stack(torch.bfloat16), engine=True)
    inputs = tokens(100, torch.bfloat16)
    together = experts.mix(*inputs)
    for size in (1, 3, 8, 33):
        parts = [experts.mix(*part) for part in zip(*(t.split(size) for t in inputs), strict=True)]
        assert torch.equal(torch.cat(parts), together)
    monkeypatch.setattr(engine_ops, "EXPERT_CHUNK", 7)
    assert torch.equal(experts.mix(*inputs), together)


@needs_vllm
def test_widths_that_the_engines_op_does_not_take() -> None:
    odd = SimpleNamespace(
        gate_up_proj=nn.Parameter(torch.ones(2, 48, 64)), down_proj=nn.Parameter(torch.ones(2, 64, 24))
    )
    with pytest.raises(KernelError, match=r"widths divisible by 32, got 64 and 24; set learner\.numerics=portable"):
        Experts(odd, engine=True)(torch.ones(1, 64), torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1))


# Low-bit experts


def expert_by_expert(experts: QuantizedExperts, x_NE: Tensor, ids_NK: Tensor, weights_NK: Tensor) -> Tensor:
    """Token by token through quantized linear layers: each share and the inner activation rounded to the dtype."""

    def layer(weight_NK: Tensor) -> QuantizedLinear:
        linear = nn.Linear(*reversed(weight_NK.shape), bias=False)
        linear.weight.data = weight_NK.detach()
        return QuantizedLinear(linear, "layer", experts.format_, experts.kernel)

    x_NE = x_NE.to(experts.wide)
    rows = []
    for x_E, ids_K, weights_K in zip(x_NE, ids_NK, weights_NK, strict=True):
        row_E = torch.zeros(WIDTH)
        for expert in ids_K.sort().values.tolist():
            gate, up = experts.gate_up_proj[expert].chunk(2)
            inner = (F.silu(layer(gate)(x_E[None])) * layer(up)(x_E[None])).bfloat16()
            weight = weights_K[ids_K == expert]
            row_E += (layer(experts.down_proj[expert])(inner.to(experts.wide))[0] * weight).bfloat16()
        rows.append(row_E)
    return torch.stack(rows).bfloat16()


@needs_vllm
@pytest.mark.parametrize("kind", ["torch", "reference"])
@pytest.mark.parametrize("scheme", FORMATS, ids=lambda scheme: scheme.name)
def test_quantized_experts_are_quantized_linears(scheme: QuantScheme, kind: KernelKind) -> None:
    experts, inputs = quantized(scheme, kind), tokens(12, torch.bfloat16)
    out_NE, expected_NE = experts(*inputs), expert_by_expert(experts, *inputs)
    # A GEMM of floats may sum in another order for another number of tokens.
    assert (out_NE != expected_NE).float().mean() < (0.02 if (scheme.name, kind) != ("w8a8_int8", "torch") else 1e-9)
    plain_NE = Experts(stack(torch.bfloat16), engine=False)(*inputs)
    assert 1e-3 < (out_NE - plain_NE).float().abs().mean() / plain_NE.float().abs().mean() < 0.3


@needs_vllm
@needs_avx512
def test_the_engines_low_bit_op_computes_the_same_and_differentiates_alike() -> None:
    inputs = tokens(60, torch.bfloat16)
    engine, torch_ = quantized(W8A8, "engine"), quantized(W8A8, "torch")
    assert engine.engine
    assert not torch_.engine
    out_NE, expected_NE = engine(*inputs), torch_(*inputs)
    # The op approximates the sigmoid: now and then a value of the inner activation falls on its neighbour.
    assert (out_NE - expected_NE).float().abs().mean() < 1e-3 * expected_NE.float().abs().mean()
    upstream = torch.randn(60, WIDTH).bfloat16()
    out_NE.backward(upstream)
    expected_NE.backward(upstream)
    for name in ("gate_up_proj", "down_proj"):
        assert torch.equal(getattr(engine, name).grad, getattr(torch_, name).grad)


@pytest.mark.parametrize(("scheme", "key"), [("fp8_tensor", "weight_scale"), ("nvfp4a16", "weight_global_scale")])
def test_gate_and_up_of_an_expert_share_the_scale_of_the_whole(scheme: SchemeName, key: str) -> None:
    tensors = quantized(QuantScheme(scheme), "reference").quantized()
    gates, ups, downs = (
        [tensors[f"{e}.{part}_proj.{key}"].item() for e in range(4)] for part in ("gate", "up", "down")
    )
    assert gates == ups
    assert len({*gates, *downs}) == 8


def test_gradient_goes_straight_through() -> None:
    """Against float64: the quantized projections as values, their derivatives those of plain products."""
    experts = quantized(W8A8, "reference", torch.float32)
    x_NE, ids_NK, weights_NK = tokens(20, torch.float32)
    leaves = [x_NE.requires_grad_(), weights_NK.requires_grad_(), experts.gate_up_proj, experts.down_proj]
    doubles = [leaf.detach().double().requires_grad_() for leaf in leaves]
    format_ = experts.format_

    def linear(x: Tensor, weight: Tensor) -> Tensor:
        value = (
            format_.round_activation(x.detach().float()).double()
            @ format_.dequantize(format_.quantize(weight.float())).double().t()
        )
        plain = x @ weight.t()
        return plain + (value - plain).detach()

    x, weights, gate_up, down = doubles
    rows = []
    for n, ids in enumerate(ids_NK.tolist()):
        shares = []
        for k, expert in enumerate(ids):
            gate_up_F = linear(x[n : n + 1], gate_up[expert])
            inner = F.silu(gate_up_F[:, :INNER]) * gate_up_F[:, INNER:]
            shares.append(linear(inner, down[expert]) * weights[n, k])
        rows.append(sum(shares))
    expected_NE, out_NE = torch.cat(rows), experts(x_NE, ids_NK, weights_NK)
    torch.testing.assert_close(out_NE.double(), expected_NE, rtol=1e-3, atol=1e-3)
    upstream = torch.randn(20, WIDTH)
    grads = torch.autograd.grad(out_NE, leaves, upstream)
    for grad, want in zip(grads, torch.autograd.grad(expected_NE, doubles, upstream.double()), strict=True):
        torch.testing.assert_close(grad.double(), want, rtol=1e-3, atol=1e-3)


# Whole models


def tiny_model() -> Qwen3MoeForCausalLM:
    torch.manual_seed(0)
    shape = dict.fromkeys(("hidden_size", "intermediate_size", "vocab_size"), 32)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_hidden_layers": 3}
    moe = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "mlp_only_layers": [1]}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**shape, **heads, **moe, tie_word_embeddings=True)).bfloat16()


def test_alignment_covers_attention_and_experts_but_no_router() -> None:
    model = tiny_model()
    before = dict(model.named_parameters())
    names = align_linears(model, W8A8, "torch")
    assert len(names) == 3 * 4 + 3 + 2
    assert not any("gate" in name.split(".") or "lm_head" in name for name in names)
    kinds = [type(layer.mlp.experts) for layer in (model.model.layers[0], model.model.layers[2])]
    assert kinds == [QuantizedExperts, QuantizedExperts]
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)


def test_router_is_ignored_by_the_library_as_well() -> None:
    config = quantization_config(W8A8)
    assert config is not None
    for name, ignored in (("model.layers.3.mlp.gate", True), ("model.layers.3.mlp.gate_proj", False)):
        assert any(match_name(name, pattern) for pattern in config["ignore"]) == ignored
        assert W8A8.covers(name) != ignored


def test_experts_stay_in_high_precision_by_a_pattern() -> None:
    model = tiny_model()
    names = align_linears(model, QuantScheme(ignore=("lm_head", "re:.*mlp.experts.*", "re:.*mlp.gate$")), "torch")
    assert len(names) == 3 * 4 + 3
    assert not isinstance(model.model.layers[0].mlp.experts, QuantizedExperts)


def test_experts_are_ignored_together_or_not_at_all() -> None:
    with pytest.raises(ConfigError, match=r"the experts of model.layers.0.mlp.experts together, of which only some"):
        align_linears(tiny_model(), QuantScheme(ignore=("lm_head", "re:.*experts.1.*")), "torch")


@pytest.mark.parametrize(
    ("scheme", "dtype", "refused"),
    [
        (W8A8, "bfloat16", False),
        (W8A8, "float32", True),
        (PLAIN, "float32", False),
        (QuantScheme("w4a16"), "bfloat16", True),
        (QuantScheme("nvfp4"), "bfloat16", True),
        (QuantScheme("w4a16", ("re:.*mlp.experts.*",)), "bfloat16", False),
        (QuantScheme("w4a16", ("re:.*layers.0.mlp.experts.*",)), "bfloat16", True),
        (QuantScheme("w4a16", ("re:.*layers.[02].mlp.experts.*",)), "bfloat16", False),
    ],
)
def test_experts_that_the_engine_cannot_run(
    scheme: QuantScheme, dtype: str, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processor, "has_avx512", lambda: True)
    config = tiny_model().config.to_dict()
    check_engine(scheme, {"num_hidden_layers": 3}, dtype, "cpu")
    if scheme.name != "nvfp4":
        check_engine(scheme, config, dtype, "cuda")
    if not refused:
        check_engine(scheme, config, dtype, "cpu")
        return
    with pytest.raises(
        KernelError, match=rf"no known kernel for experts in {scheme.name}.*add 're:\.\*mlp\.experts\.\*' to"
    ):
        check_engine(scheme, config, dtype, "cpu")


def test_int8_experts_need_avx512(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "has_avx512", lambda: False)
    config = tiny_model().config.to_dict()
    with pytest.raises(
        KernelError, match=r"no known kernel for experts in w8a8_int8 with bfloat16 on cpu without AVX-512; add 're:"
    ):
        check_engine(W8A8, config, "bfloat16", "cpu")
    check_engine(QuantScheme(ignore=("re:.*mlp.experts.*",)), config, "bfloat16", "cpu")
    check_engine(W8A8, config, "bfloat16", "cuda")
    with pytest.raises(KernelError, match=r"no 'engine' kernel for experts in w8a8_int8 on cpu without AVX-512; set"):
        quantized(W8A8, "engine")
    assert not quantized(W8A8, "auto").engine


def test_a_weight_that_is_no_number_is_named() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[2].mlp.experts.gate_up_proj[1, 40, 3] = math.nan  # row 8 of the upper half
    align_linears(model, W8A8, "torch")
    with pytest.raises(KernelError, match=r"layers.2.mlp.experts.1.up_proj: NaN or infinity in weight rows \[8\]"):
        publish(model, W8A8, 0)


def test_off_both_grids_experts_are_plain() -> None:
    model = tiny_model()
    x_NE, ids_NK, weights_NK = torch.randn(5, 32).bfloat16(), torch.tensor([[0, 2]] * 5), torch.full((5, 2), 0.5)
    plain_NE = Experts(model.model.layers[0].mlp.experts, engine=False)(x_NE, ids_NK, weights_NK)
    align_linears(model, W8A8, "torch")
    use_reference(model, W8A8, weight_grid=False, activation_grid=False)
    out_NE = model.model.layers[0].mlp.experts(x_NE, ids_NK, weights_NK)
    assert (out_NE - plain_NE).float().abs().max() <= 2**-6 * plain_NE.float().abs().max()  # shares are rounded here


def test_quantized_experts_are_kept_until_requantize() -> None:
    model = tiny_model()
    align_linears(model, W8A8, "torch")
    experts = model.model.layers[0].mlp.experts
    x_NE, ids_NK, weights_NK = torch.randn(5, 32).bfloat16(), torch.tensor([[0, 2]] * 5), torch.full((5, 2), 0.5)
    before = experts(x_NE, ids_NK, weights_NK)
    with torch.no_grad():
        experts.down_proj.mul_(2.0)
    assert torch.equal(experts(x_NE, ids_NK, weights_NK), before)
    requantize(model)
    assert torch.equal(experts(x_NE, ids_NK, weights_NK), 2 * before)


# Publication


def test_published_names_are_transformers(tmp_path: Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path / "stock")
    stored = load_file(tmp_path / "stock" / "model.safetensors")
    published = dict(unpack(publish(model, PLAIN, 0)))
    assert torch.equal(published.pop("lm_head.weight"), stored["model.embed_tokens.weight"])  # tied
    assert published.keys() == stored.keys()
    assert all(torch.equal(stored[name], tensor) for name, tensor in published.items())


def test_plain_checkpoint_loads_in_transformers(tmp_path: Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path / "source")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    align_linears(model, W8A8, "torch")
    write_checkpoint(checkpoint_tensors(model, quantized=False), tmp_path / "out", tmp_path / "source", PLAIN)
    state = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16).state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


def test_published_are_the_bytes_of_the_experts_gemm() -> None:
    model = tiny_model()
    names = align_linears(model, W8A8, "torch")
    tensors = dict(unpack(publish(model, W8A8, 0)))
    projections = [
        f"{n}.{e}.{p}_proj" for n in names if "experts" in n for e in range(3) for p in ("gate", "up", "down")
    ]
    quantized_names = [f"{name}.weight" for name in (*projections, *names) if not name.endswith("experts")]
    assert {name for name, tensor in tensors.items() if tensor.dtype == torch.int8} == set(quantized_names)
    format_, experts = format_of(W8A8), model.model.layers[0].mlp.experts
    expected = format_.quantize(experts.gate_up_proj[1, 32:])
    for key, tensor in expected.items():
        assert torch.equal(tensors[f"model.layers.0.mlp.experts.1.up_proj.{key}"], tensor)
    assert tensors["model.layers.0.mlp.gate.weight"].dtype == torch.bfloat16
    assert not any("gate_up_proj" in name for name in tensors)


def test_plain_tensors_share_the_models_memory() -> None:
    """The learner copies weights into a stock_policy through them."""
    model, other = tiny_model(), tiny_model()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.normal_()
        targets = dict(checkpoint_tensors(model, quantized=False))
        for name, tensor in checkpoint_tensors(other, quantized=False):
            targets[name].copy_(tensor)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_router_keeps_the_name_of_its_weight() -> None:
    gate = tiny_model().model.layers[0].mlp.gate
    assert Router(gate, engine=False).weight is gate.weight

"""Aligned linears of every format: kernels against their reference, straight-through gradients, saved memory."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qarl.errors import ConfigError, KernelError
from qarl.numerics import engine_ops, processor
from qarl.quant.formats import check_processor, engine_kernels, format_of
from qarl.quant.int8 import quantize_activation
from qarl.quant.kernels import choose_kernel
from qarl.quant.linear import QuantizedLinear, align_linears
from qarl.quant.scheme import TRAITS, FloatScheme, KernelKind, QuantScheme, SchemeName
from tests.support.hosts import engine_sums, needs_avx512

CPU = torch.device("cpu")
CPU_KINDS: dict[SchemeName, tuple[KernelKind, ...]] = {
    **dict.fromkeys(get_args(FloatScheme), ("reference",)),
    "w8a8_int8": ("engine", "torch", "reference"),
    "w4a16": ("engine", "torch", "reference"),
    "w4a8": ("torch", "reference"),
    "fp8_channel": ("torch", "reference"),
}
SCHEMES = [
    QuantScheme(name, group_size=group)
    for name in CPU_KINDS
    for group in ((32, 128) if TRAITS[name].grouped else (128,))
]
KERNELS = [
    pytest.param(scheme, kind, marks=[needs_avx512] if (scheme.name, kind) == ("w4a16", "engine") else [])
    for scheme in SCHEMES
    for kind in CPU_KINDS[scheme.name]
]
needs_vllm = pytest.mark.skipif(not engine_ops.available(), reason="vLLM is not installed")


def aligned(linear: nn.Linear, scheme: QuantScheme, kind: str) -> QuantizedLinear:
    format_ = format_of(scheme)
    kernel = choose_kernel(format_, CPU, linear.weight.dtype, kind)  # type: ignore[arg-type]
    return QuantizedLinear(linear, "layer", format_, kernel)


def ident(value: object) -> str:
    return f"{value.name}-g{value.group_size}" if isinstance(value, QuantScheme) else str(value)


@needs_vllm
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("scheme", "kind"), KERNELS, ids=ident)
def test_kernel_computes_its_reference(scheme: QuantScheme, kind: KernelKind, bias: bool) -> None:
    torch.manual_seed(0)
    layer = aligned(nn.Linear(256, 64, bias=bias).bfloat16(), scheme, kind)
    x = (torch.randn(7, 256) * torch.rand(7, 1) * 4).bfloat16()
    y = layer(x)
    assert y.dtype == torch.bfloat16
    format_, quantized = layer.format_, layer.quantized()
    exact = format_.round_activation(x).double() @ format_.dequantize(quantized).double().t()
    if (scheme.name, kind) == ("w8a8_int8", "engine") and not processor.has_vnni():  # its sums saturate
        q_x, scale_x = quantize_activation(x)
        exact = engine_sums(q_x, quantized["weight"]) * scale_x.double() * quantized["weight_scale"].double().t()
    if layer.bias is not None:
        exact = exact + layer.bias.double()
    # One rounding of the output; int4 weights are rounded to bfloat16 as well before W4A16's product.
    error = (y.double() - exact).abs() / exact.abs().amax()
    assert error.max() < 2**-7
    plain = F.linear(x, layer.weight, layer.bias).double()
    assert error.mean() < (plain - exact).abs().mean() / exact.abs().amax() / 4, "no nearer than the plain layer"


@needs_vllm
@pytest.mark.parametrize("lead", [(6,), (2, 3)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("scheme", "kind"), KERNELS, ids=ident)
def test_gradient_is_straight_through(scheme: QuantScheme, kind: KernelKind, bias: bool, lead: tuple[int, ...]) -> None:
    torch.manual_seed(5)
    layer = aligned(nn.Linear(128, 32, bias=bias).bfloat16(), scheme, kind)
    x = torch.randn(*lead, 128).bfloat16().requires_grad_()
    upstream = torch.randn(*lead, 32).bfloat16()
    leaves = [x, *layer.parameters()]
    grads = torch.autograd.grad(layer(x), leaves, upstream)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = torch.autograd.grad(F.linear(*exact), exact, upstream.double())
    for grad, want in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad.double(), want, rtol=2**-7, atol=want.abs().max().item() * 2**-8)


def saved_bytes(call: Callable[[Tensor], Tensor], x: Tensor) -> int:
    saved: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call(x)
    return sum(saved)


@needs_vllm
@pytest.mark.parametrize(("scheme", "kind"), KERNELS, ids=ident)
def test_no_more_is_saved_than_a_linear_saves(scheme: QuantScheme, kind: KernelKind) -> None:
    linear = nn.Linear(128, 32).bfloat16()
    x = torch.randn(10, 128, dtype=torch.bfloat16, requires_grad=True)
    plain = saved_bytes(linear, x)
    assert plain == x.nbytes + linear.weight.nbytes
    assert saved_bytes(aligned(linear, scheme, kind), x) == plain


def test_gradient_only_where_it_is_needed() -> None:
    layer = aligned(nn.Linear(32, 8, bias=False), QuantScheme(), "torch")
    layer(torch.randn(3, 32)).sum().backward()
    assert layer.weight.grad is not None


@pytest.mark.parametrize("scheme", SCHEMES, ids=ident)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_weight_that_is_no_number_is_named(scheme: QuantScheme, value: float) -> None:
    linear = nn.Linear(128, 8, bias=False)
    with torch.no_grad():
        linear.weight[5, 7] = value
    with pytest.raises(KernelError, match=r"layer: NaN or infinity in weight rows \[5\]"):
        aligned(linear, scheme, "reference").quantized()


def test_shape_that_the_group_does_not_divide() -> None:
    model = nn.Sequential(nn.Linear(48, 8))
    with pytest.raises(ConfigError, match=r"rollout.scheme: w4a16 needs input features divisible by 32, 0 has 48"):
        align_linears(model, QuantScheme("w4a16", (), 32))


def test_a_fused_layer_is_quantized_whole_or_not_at_all() -> None:
    model = nn.ModuleDict({f"{part}_proj": nn.Linear(32, 32) for part in ("q", "k", "v", "o")})
    with pytest.raises(ConfigError, match="the engine fuses k_proj with q_proj, of which only one is quantized"):
        align_linears(model, QuantScheme(ignore=("q_proj",)), "torch")
    assert align_linears(model, QuantScheme(ignore=("q_proj", "k_proj", "v_proj")), "torch") == ["o_proj"]


@pytest.mark.parametrize(("inputs", "outputs", "side"), [(192, 128, "input"), (128, 192, "output")])
def test_blocks_divide_what_the_engine_fuses(inputs: int, outputs: int, side: str) -> None:
    scheme = QuantScheme("fp8_block", ())
    model = nn.ModuleDict({f"{part}_proj": nn.Linear(inputs, outputs) for part in ("gate", "up")})
    with pytest.raises(ConfigError, match=f"fp8_block needs {side} features divisible by 128, gate_proj has 192"):
        align_linears(model, scheme, "reference")
    last = nn.ModuleDict(
        {"gate_proj": nn.Linear(128, 128), "up_proj": nn.Linear(128, 192), "o_proj": nn.Linear(128, 8)}
    )
    assert len(align_linears(last, scheme, "reference")) == 3


@pytest.mark.parametrize("name", [name for name, kinds in CPU_KINDS.items() if kinds == ("reference",)])
def test_only_the_reference_runs_a_format_that_cpus_lack(name: SchemeName) -> None:
    model = nn.Sequential(nn.Linear(128, 16))
    with pytest.raises(KernelError, match=f"no low-bit kernel for {name} on cpu.*set it to 'reference', or take"):
        align_linears(model, QuantScheme(name, ()))
    with pytest.raises(
        ConfigError, match=f"vLLM has no {name} kernel on cpu; take w8a8_int8, w4a16, w4a8, fp8_channel"
    ):
        engine_kernels(QuantScheme(name), "cpu")
    assert engine_kernels(QuantScheme(name), "cuda")


def test_a_kernel_that_is_not_there_is_an_error() -> None:
    scheme = QuantScheme("w4a8")
    with pytest.raises(KernelError, match=r"learner.kernel: no low-bit kernel for w4a8 on cuda.*'reference'"):
        choose_kernel(format_of(scheme), torch.device("cuda"), torch.bfloat16)
    with pytest.raises(KernelError, match=r"no 'engine' kernel for w8a8_int8 on cuda.*'torch' or 'reference'"):
        choose_kernel(format_of(QuantScheme()), torch.device("cuda"), torch.bfloat16, "engine")


@needs_vllm
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_w4a16_kernels_want_bfloat16(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "has_avx512", lambda: True)
    scheme = QuantScheme("w4a16")
    with pytest.raises(KernelError, match=f"w4a16 kernel on {device} computes in bfloat16; set model"):
        choose_kernel(format_of(scheme), torch.device(device), torch.float32)


@needs_vllm
def test_w4a16_on_a_processor_without_avx512_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a learner alone: a run with an engine on such a processor is an error."""
    monkeypatch.setattr(processor, "has_avx512", lambda: False)
    scheme = QuantScheme("w4a16")
    assert choose_kernel(format_of(scheme), CPU, torch.bfloat16).name == "torch dequantized"
    with pytest.raises(
        KernelError, match=r"no 'engine' kernel for w4a16 on cpu without AVX-512; set it to 'torch' or 'reference'"
    ):
        choose_kernel(format_of(scheme), CPU, torch.bfloat16, "engine")
    assert choose_kernel(format_of(QuantScheme()), CPU, torch.bfloat16).name == "vllm.onednn_scaled_mm"
    with pytest.raises(ConfigError, match=r"no w4a16 kernel on a processor without AVX-512; take w8a8_int8, w4a8, fp8"):
        check_processor(scheme, "cpu")
    for other, device in ((scheme, "cuda"), (QuantScheme(), "cpu"), (QuantScheme("none"), "cpu")):
        check_processor(other, device)


def test_w4a16_on_cuda_is_tritons_unless_torch_is_asked_for() -> None:
    scheme, cuda = QuantScheme("w4a16"), torch.device("cuda")
    for kind, name in (("auto", "triton W4A16"), ("triton", "triton W4A16"), ("torch", "torch dequantized")):
        kernel = choose_kernel(format_of(scheme), cuda, torch.bfloat16, kind)  # type: ignore[arg-type]
        assert kernel.name == name


def test_missing_triton_is_an_error_and_no_fall_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    scheme = QuantScheme("w4a16")
    with pytest.raises(KernelError, match=r"learner.kernel: .* needs triton, which is not installed; install triton"):
        choose_kernel(format_of(scheme), torch.device("cuda"), torch.bfloat16)


@pytest.mark.parametrize("scheme", SCHEMES, ids=ident)
def test_all_tensors_of_a_format_are_on_the_weights_device(scheme: QuantScheme) -> None:
    """NCCL sends from one device; what is made without naming one would stay behind on the host."""
    weight, quantize = torch.randn(128, 128), format_of(scheme).quantize
    quantize(weight)  # constants are made once
    with torch.device("meta"):  # where a tensor lands that names no device
        assert {tensor.device for tensor in quantize(weight).values()} == {weight.device}


def test_group_size_outside_the_formats() -> None:
    with pytest.raises(ConfigError, match=r"rollout.group_size: group size 48 is none of 32, 64, 128"):
        format_of(QuantScheme("w4a16", group_size=48))

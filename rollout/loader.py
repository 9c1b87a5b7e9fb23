"""Inside vLLM's workers: published weights taken over in place, and the proof that the engine computes with them.

Suffixes: M rows, K input features, N output features; X experts, E model width, I inner width.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import groupby
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qarl.errors import PublicationError
from qarl.numerics import engine_ops
from qarl.numerics.moe import Experts
from qarl.quant.experts import PARTS
from qarl.quant.formats import format_of
from qarl.quant.kernels import choose_kernel
from qarl.quant.scheme import FUSED, KernelKind, QuantScheme
from qarl.weights.source import Bucket, WeightSource
from qarl.weights.wire import arrived

ROWS = 128  # of a layer's GEMM in the read-back
EXPERT_ROWS = 16  # tokens of each expert in the read-back
Parts = dict[str, dict[str, Tensor]]
"""The checkpoint's tensors of an engine's layer: {`q_proj`: {`weight`: ..., `weight_scale`: ...}, `k_proj`: ...}."""


class WeightLoader:
    """vLLM worker extension (vLLM calls it in each of its workers)."""

    def qarl_load(self, tensors: Iterator[tuple[str, Tensor]], scheme: QuantScheme) -> None:
        """Load a checkpoint's tensors in place, layer by layer as they come. After an error it holds a mixture."""
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        done = False
        try:
            self.reload_weights(weights_iterator=engine_names(tensors, scheme))  # type: ignore[attr-defined]
            done = True
        finally:
            if not done:  # vLLM would count the next reload's tensors on top of this one's
                finalize_layerwise_reload(self.get_model(), self.model_config)  # type: ignore[attr-defined]

    def qarl_received(self) -> Bucket:
        """What a transfer engine has brought and nobody has taken yet; then it is taken."""
        received: Bucket = self.weight_transfer_engine.inbox.take()  # type: ignore[attr-defined]
        return received

    def qarl_read_back(self, weights: WeightSource, scheme: QuantScheme) -> None:
        """Compare every layer of the engine with `weights`. Raises as `read_back`."""
        with torch.inference_mode():
            read_back(self.get_model(), weights, scheme)  # type: ignore[attr-defined]

    def qarl_kernels(self) -> dict[str, str]:
        """Class name of the low-bit kernel of every linear layer and expert stack, by name; empty where it has none."""
        from vllm.model_executor.layers.fused_moe import RoutedExperts, UnquantizedFusedMoEMethod
        from vllm.model_executor.layers.linear import LinearBase

        kernels: dict[str, Any] = {}
        for name, layer in self.get_model().named_modules():  # type: ignore[attr-defined]
            if isinstance(layer, LinearBase):
                scheme = getattr(layer, "scheme", None)
                kernels[name] = getattr(scheme, "kernel", getattr(scheme, "fp8_linear", None))
            elif isinstance(layer, RoutedExperts):
                plain = isinstance(layer.quant_method, UnquantizedFusedMoEMethod)
                kernels[name] = None if plain else layer.quant_method.moe_kernel.fused_experts
        return {name: "" if kernel is None else type(kernel).__name__ for name, kernel in kernels.items()}


def engine_names(tensors: Iterator[tuple[str, Tensor]], scheme: QuantScheme) -> Iterator[tuple[str, Tensor]]:
    """`tensors` as the engine's reload wants them named.

    vLLM registers a W4A8 weight under two names; a fresh load fills both at once, a reload each for itself.
    """
    for name, tensor in tensors:
        yield name, tensor
        if scheme.name == "w4a8" and tensor.dtype == torch.int8:
            yield f"{name}_packed", tensor


def read_back(model: nn.Module, weights: WeightSource, scheme: QuantScheme) -> None:
    """See that the engine's `model` computes with `weights`, whatever its kernels have made of the bytes.

    Embeddings and norms are compared as they are. A linear layer multiplies sparse rows in which each weight, scale and
    bias shows, and must give what the learner's layer gives. Experts compute random tokens. On CPU all of it is equal
    in every bit, but for dense layers in float32; elsewhere kernels may round once more.

    Raises:
        PublicationError: a layer that computes something else, or that no published tensor belongs to.
    """
    from vllm.model_executor.layers.fused_moe import RoutedExperts
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    layers = {name: layer for name, layer in model.named_modules() if _holds_weights(layer)}
    seen: set[str] = set()
    device = next(model.parameters()).device
    for name, group in groupby(arrived(weights), lambda pair: _layer_of(pair[0])):
        layer, tensors, prefix = layers.get(name), list(group), name.rpartition(".")[0]
        if layer is None:
            raise PublicationError(f"the engine has no layer {name}")
        seen.add(name)
        parts: Parts = {}
        for key, tensor in tensors:
            module, _, kind = key.removeprefix(f"{prefix}.").rpartition(".")
            parts.setdefault(module, {})[kind] = tensor.to(device)
        some = next(iter(parts))
        covered = scheme if scheme.covers(f"{prefix}.{some}" if prefix else some) else QuantScheme("none")
        if isinstance(layer, RoutedExperts):
            _mixture(name, layer, parts, covered)
        elif isinstance(layer, LinearBase):
            _product(name, layer, parts, covered)
        else:
            weight = parts[some]["weight"]
            _compare(name, layer.weight[: len(weight)], weight)
            if isinstance(layer, ParallelLMHead):
                _product(name, layer, parts, covered)
    if missing := [name for name in layers if name not in seen]:
        raise PublicationError(f"no tensor of {missing[0]} was published")


def _holds_weights(layer: nn.Module) -> bool:
    quantized = hasattr(layer, "quant_method") and not hasattr(layer, "kv_cache")  # attention: scales of its cache only
    return quantized or isinstance(getattr(layer, "weight", None), Tensor)


def _layer_of(tensor: str) -> str:
    """The engine's layer that holds the checkpoint's tensor called `tensor`."""
    module = tensor.rpartition(".")[0]
    stack, _, expert = module.partition(".experts.")
    if expert:
        return f"{stack}.experts.routed_experts"
    parent, _, part = module.rpartition(".")
    fused = next((name for name, parts in FUSED.items() if part in parts), part)
    return f"{parent}.{fused}" if parent else fused


def _compare(name: str, held: Tensor, published: Tensor, exact: bool = True) -> None:
    same = (
        torch.equal if exact else partial(torch.allclose, rtol=1e-4 if held.device.type == "cpu" else 2**-7, atol=1e-5)
    )
    if held.shape != published.shape or not same(held, published):
        raise PublicationError(f"the engine's {name} does not compute with what was published")


def _product(name: str, layer: Any, parts: Parts, scheme: QuantScheme) -> None:
    """Compare what the engine's layer and the learner's make of `_rows`: [M, N]."""
    inputs = layer.input_size if hasattr(layer, "input_size") else layer.embedding_dim
    device, dtype = next(iter(next(iter(parts.values())).values())).device, layer.params_dtype
    x_MK = _rows(inputs).to(device, dtype)
    ours_MN = torch.cat([_linear(part, scheme, x_MK) for part in parts.values()], dim=-1)
    theirs_MN = layer.quant_method.apply(layer, x_MK, layer.bias)
    if name == "lm_head":  # padded to a multiple of 64
        theirs_MN = theirs_MN[:, : ours_MN.shape[1]]
    # The order of a dense layer's float32 sums depends on the batch; elsewhere kernels differ.
    _compare(name, theirs_MN, ours_MN, device.type == "cpu" and (scheme.quantizes or dtype != torch.float32))
    if not scheme.quantizes:  # the bytes themselves, where the engine's kernel has not packed them away
        weight_NK = torch.cat([part["weight"] for part in parts.values()])
        held = getattr(layer, "weight", None)
        if isinstance(held, Tensor) and held.numel() >= weight_NK.numel():
            _compare(name, held[: len(weight_NK)], weight_NK)


def _rows(inputs: int) -> Tensor:
    """[M, K], 1 or -1 once in every column, zero else: a product's value is made of K / M weights.

    So few of them that a change of one is seldom lost when the sum is rounded to bfloat16.
    """
    column = torch.arange(inputs)
    signs = torch.randint(0, 2, (inputs,), generator=torch.Generator().manual_seed(0)) * 2 - 1
    x_MK = torch.zeros(min(ROWS, inputs), inputs)
    x_MK[column % ROWS, column] = signs.float()
    return x_MK


def _linear(part: dict[str, Tensor], scheme: QuantScheme, x_MK: Tensor) -> Tensor:
    """The learner's layer of these tensors: [M, N]. It has the engine's op on CPU, else float32 arithmetic."""
    bias = part.get("bias")
    if not scheme.quantizes:
        return F.linear(x_MK, part["weight"], bias)
    kind: KernelKind = "auto" if x_MK.device.type == "cpu" else "reference"
    kernel = choose_kernel(scheme, format_of(scheme), x_MK.device, x_MK.dtype, kind)
    quantized = {kind: tensor for kind, tensor in part.items() if kind != "bias"}
    return kernel.forward(x_MK, kernel.prepare(quantized, bias))


def _mixture(name: str, layer: Any, parts: Parts, scheme: QuantScheme) -> None:
    """Compare what the engine's experts and the learner's make of random tokens, each expert of its own: [M, E].

    Not for low-bit experts on GPU, where the learner has no op that rounds as the engine's; the probe covers them.
    """
    experts = range(layer.global_num_experts)

    def stacked(kind: str) -> tuple[Tensor, Tensor]:
        gate, up, down = (torch.stack([parts[f"{expert}.{part}"][kind] for expert in experts]) for part in PARTS)
        return torch.cat((gate, up), dim=1), down

    gate_up, down = stacked("weight")
    on_cpu = down.device.type == "cpu"
    if scheme.quantizes and not on_cpu:
        return
    ids = torch.arange(len(experts)).repeat_interleave(EXPERT_ROWS)[:, None]
    x = torch.randn(len(ids), layer.hidden_size, generator=torch.Generator().manual_seed(0)).to(layer.params_dtype)
    x, ids, share = x.to(down.device), ids.to(down.device, torch.int32), torch.ones(len(ids), 1, device=down.device)
    if scheme.quantizes:
        ours = engine_ops.Int8Experts((gate_up, down), stacked("weight_scale"))(x, ids, share)
    else:
        weights = {"gate_up_proj": nn.Parameter(gate_up, False), "down_proj": nn.Parameter(down, False)}
        ours = Experts(SimpleNamespace(**weights), engine=on_cpu).mix(x, ids, share)
    _compare(name, layer.forward_modular(x, share, ids), ours, exact=on_cpu)

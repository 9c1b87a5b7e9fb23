"""Read back what vLLM's model computes, and compare it with the published weights.

CPU kernels repack weights and drop the originals, so a layer's weights can only be seen through its output.
"""

from dataclasses import dataclass
from functools import partial
from itertools import groupby
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qarl.errors import PublicationError
from qarl.numerics import engine_ops
from qarl.numerics.dense import DenseWeight
from qarl.numerics.moe import Experts
from qarl.numerics.shards import input_slice
from qarl.quant.experts import stacked
from qarl.quant.formats import format_of
from qarl.quant.kernels import choose_kernel
from qarl.quant.scheme import FUSED, KernelKind, QuantScheme
from qarl.weights.source import Manifest, WeightSource
from qarl.weights.wire import to_torch

ROWS = 128
"""Rows of the matrix that a linear layer multiplies."""
EXPERT_ROWS = 16
"""Random tokens for each expert."""
Parts = dict[str, dict[str, Tensor]]
"""Checkpoint tensors of one layer of the engine: {"q_proj": {"weight": ..., "weight_scale": ...}, "k_proj": ...}."""


@dataclass(frozen=True)
class Selection:
    """Which layers are read back: those with a tensor that differs from `previous`, which the engine held before the
    load; and of the others, in the order of publication, every `every`-th from number `turn` on."""

    previous: Manifest
    every: int
    turn: int

    def layers(self, manifest: Manifest) -> set[str]:
        before, now = _tensors_by_layer(self.previous), _tensors_by_layer(manifest)
        return {
            name for number, name in enumerate(now) if number % self.every == self.turn or now[name] != before.get(name)
        }


def read_back(model: nn.Module, weights: WeightSource, scheme: QuantScheme, selection: Selection | None = None) -> None:
    """Check that the engine's `model` computes with `weights`, in the selected layers; None for all.

    Embeddings and norms are compared byte by byte. A linear layer multiplies sparse rows, so that each weight, scale
    and bias shows in the product, and must give what the learner's layer gives. Experts compute random tokens. On CPU
    the results must be bitwise equal; on GPU they may differ by one rounding.

    Raises:
        PublicationError: a layer computes something else, or no tensor was published for it.
    """
    from vllm.model_executor.layers.fused_moe import RoutedExperts
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    layers = {name: layer for name, layer in model.named_modules() if _holds_weights(layer)}
    published = _tensors_by_layer(weights.manifest)
    if unknown := [name for name in published if name not in layers]:
        raise PublicationError(f"the engine has no layer {unknown[0]}")
    if missing := [name for name in layers if name not in published]:
        raise PublicationError(f"no tensor of {missing[0]} was published")
    selected = set(published) if selection is None else selection.layers(weights.manifest)
    device = next(model.parameters()).device
    tensors = (tensor for bucket in weights.buckets() for tensor in bucket)
    for name, group in groupby(tensors, lambda tensor: _layer_of(tensor.name)):
        if name not in selected:
            continue
        layer, prefix = layers[name], name.rpartition(".")[0]
        parts: Parts = {}
        for tensor in group:
            module, _, kind = tensor.name.removeprefix(f"{prefix}.").rpartition(".")
            parts.setdefault(module, {})[kind] = to_torch(tensor, copy=False).to(device)
        parts = {part: _held(layer, tensors) for part, tensors in parts.items()}
        example_name = next(iter(parts))
        covered = scheme.covers(f"{prefix}.{example_name}" if prefix else example_name)
        layer_scheme = scheme if covered else QuantScheme("none")
        if isinstance(layer, RoutedExperts):
            _compare_experts(name, layer, parts, layer_scheme)
        elif isinstance(layer, LinearBase | ParallelLMHead):
            _compare_linear(name, layer, parts, layer_scheme)
        else:
            weight = parts[example_name]["weight"]
            _compare(name, layer.weight[: len(weight)], weight)


def _held(layer: Any, part: dict[str, Tensor]) -> dict[str, Tensor]:
    """What this process of a tensor-parallel engine has of a layer's tensors; otherwise all of them."""
    from vllm.model_executor.layers.linear import RowParallelLinear
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    if getattr(layer, "tp_size", 1) == 1:
        return part
    if isinstance(layer, RowParallelLinear):
        return input_slice(part, layer.tp_rank, layer.tp_size)
    if isinstance(layer, VocabParallelEmbedding):
        rows = layer.shard_indices
        return {kind: t[rows.org_vocab_start_index : rows.org_vocab_end_index] for kind, t in part.items()}
    return {kind: tensor.chunk(layer.tp_size)[layer.tp_rank] for kind, tensor in part.items()}


def _holds_weights(layer: nn.Module) -> bool:
    # Attention has a quant_method, too, but only for the scales of its KV cache.
    quantized = hasattr(layer, "quant_method") and not hasattr(layer, "kv_cache")
    return quantized or isinstance(getattr(layer, "weight", None), Tensor)


def _tensors_by_layer(manifest: Manifest) -> dict[str, list[tuple[str, str]]]:
    """(name, digest) of the tensors of each layer of the engine, in the order of publication."""
    grouped = groupby(manifest.tensors, lambda pair: _layer_of(pair[0]))
    return {layer: list(tensors) for layer, tensors in grouped}


def _layer_of(tensor: str) -> str:
    """The engine's layer that holds the checkpoint tensor with this name."""
    module = tensor.rpartition(".")[0]
    stack, _, expert = module.partition(".experts.")
    if expert:
        return f"{stack}.experts.routed_experts"
    parent, _, part = module.rpartition(".")
    fused = next((name for name, parts in FUSED.items() if part in parts), part)
    return f"{parent}.{fused}" if parent else fused


def _compare(name: str, engine: Tensor, published: Tensor, exact: bool = True) -> None:
    rtol = 1e-4 if engine.device.type == "cpu" else 2**-7
    equal = torch.equal if exact else partial(torch.allclose, rtol=rtol, atol=1e-5)
    if engine.shape != published.shape or not equal(engine, published):
        raise PublicationError(f"the engine's {name} does not compute with what was published")


def _compare_linear(name: str, layer: Any, parts: Parts, scheme: QuantScheme) -> None:
    """Compare the products of `_rows` with the engine's layer and with the learner's: [M, N]."""
    inputs = layer.embedding_dim if hasattr(layer, "embedding_dim") else layer.input_size
    device, dtype = next(iter(next(iter(parts.values())).values())).device, layer.params_dtype
    x_MK = _rows(getattr(layer, "input_size_per_partition", inputs)).to(device, dtype)
    learner_MN = _joined([_learner_linear(part, scheme, x_MK) for part in parts.values()], dim=1)
    engine_MN = layer.quant_method.apply(layer, x_MK, layer.bias)
    if name == "lm_head":  # padded to a multiple of 64
        engine_MN = engine_MN[:, : learner_MN.shape[1]]
    _compare(name, engine_MN, learner_MN, exact=device.type == "cpu")  # GPU kernels differ from the learner's
    if not scheme.quantizes:  # compare the bytes, too, unless the engine's kernel has repacked them
        weight_NK = _joined([part["weight"] for part in parts.values()], dim=0)
        held = getattr(layer, "weight", None)
        if isinstance(held, Tensor) and held.numel() >= weight_NK.numel():
            _compare(name, held[: len(weight_NK)], weight_NK)


def _joined(tensors: list[Tensor], dim: int) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)  # of a head no copy


def _rows(inputs: int) -> Tensor:
    """[M, K] with one entry, 1 or -1, in every column: each value of a product is a sum of only K / M weights.

    With so few, a change of one weight is seldom lost when the sum is rounded to bfloat16.
    """
    column = torch.arange(inputs)
    signs = torch.randint(0, 2, (inputs,), generator=torch.Generator().manual_seed(0)) * 2 - 1
    x_MK = torch.zeros(min(ROWS, inputs), inputs)
    x_MK[column % ROWS, column] = signs.float()
    return x_MK


def _learner_linear(part: dict[str, Tensor], scheme: QuantScheme, x_MK: Tensor) -> Tensor:
    """[M, N] of the learner's layer with these tensors: with the engine's op on CPU, in float32 arithmetic on GPU."""
    bias = part.get("bias")
    if not scheme.quantizes:
        weight_NK = part["weight"]
        return DenseWeight(weight_NK)(x_MK, bias) if x_MK.device.type == "cpu" else F.linear(x_MK, weight_NK, bias)
    kind: KernelKind = "auto" if x_MK.device.type == "cpu" else "reference"
    kernel = choose_kernel(format_of(scheme), x_MK.device, x_MK.dtype, kind)
    quantized = {kind: tensor for kind, tensor in part.items() if kind != "bias"}
    return kernel.forward(x_MK, kernel.prepare(quantized, bias))


def _compare_experts(name: str, layer: Any, parts: Parts, scheme: QuantScheme) -> None:
    """Compare the engine's experts with the learner's on random tokens, each routed to one expert: [T, E].

    Low-bit experts on GPU are skipped: the learner has no op that rounds as the engine's does. The probe covers them.
    """
    experts = layer.global_num_experts
    gate_up, down = stacked(parts, "weight", experts)
    on_cpu = down.device.type == "cpu"
    if scheme.quantizes and not on_cpu:
        return
    ids_T1 = torch.arange(experts).repeat_interleave(EXPERT_ROWS)[:, None].to(down.device, torch.int32)
    x_TE = torch.randn(len(ids_T1), layer.hidden_size, generator=torch.Generator().manual_seed(0))
    x_TE = x_TE.to(layer.params_dtype).to(down.device)
    router_weights_T1 = torch.ones(len(ids_T1), 1, device=down.device)
    if scheme.quantizes:
        scales = stacked(parts, "weight_scale", experts)
        learner_TE = engine_ops.Int8Experts((gate_up, down), scales)(x_TE, ids_T1, router_weights_T1)
    else:
        stack = SimpleNamespace(gate_up_proj=nn.Parameter(gate_up, False), down_proj=nn.Parameter(down, False))
        learner_TE = Experts(stack, engine=on_cpu).mix(x_TE, ids_T1, router_weights_T1)
    engine_TE = layer.forward_modular(x_TE, router_weights_T1, ids_T1)
    _compare(name, engine_TE, learner_TE, exact=on_cpu)

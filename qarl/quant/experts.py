"""Experts whose forward is the real low-bit GEMM: each projection of each expert quantized as a linear layer is.

Suffixes: N tokens, X experts, K of them for a token, E model width, I inner width, F = 2I.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from qarl.errors import ConfigError, KernelError
from qarl.numerics import engine_ops, processor
from qarl.numerics.moe import Experts
from qarl.quant.format import Quantized
from qarl.quant.formats import format_of
from qarl.quant.kernels import StraightThrough, choose_kernel
from qarl.quant.scheme import KernelKind, QuantScheme

PARTS = ("gate_proj", "up_proj", "down_proj")


def is_stack(module: nn.Module) -> bool:
    """Whether the module is an expert stack: it has `gate_up_proj` [X, 2I, E] and `down_proj` [X, E, I]."""
    return isinstance(module, Experts | Qwen3MoeExperts)


def expert_stacks(model: nn.Module) -> dict[str, nn.Module]:
    """Expert stacks of the model, by name."""
    return {name: module for name, module in model.named_modules() if is_stack(module)}


def expert_weights(stack: Any) -> Iterator[tuple[str, Tensor]]:
    """(`3.up_proj`, weight [N, K]) of every projection, as views, in the names of a checkpoint."""
    for expert, (gate_up, down) in enumerate(zip(stack.gate_up_proj.detach(), stack.down_proj.detach(), strict=True)):
        for part, weight in zip(PARTS, (*gate_up.chunk(2), down), strict=True):
            yield f"{expert}.{part}", weight


def stacked(parts: dict[str, Quantized], key: str, experts: int) -> tuple[Tensor, Tensor]:
    """The tensors called `key` of all experts as two stacks: gate and up [X, 2I, ...], down [X, E, ...]."""
    gate, up, down = (torch.stack([parts[f"{expert}.{part}"][key] for expert in range(experts)]) for part in PARTS)
    return torch.cat((gate, up), dim=1), down


def covers_experts(scheme: QuantScheme, name: str, stack: Any) -> bool:
    """Whether the experts of the stack called `name` are quantized.

    Raises ConfigError: only some of them are; the engine runs a stack in one kernel.
    """
    covered = {scheme.covers(f"{name}.{part}") for part, _ in expert_weights(stack)}
    if len(covered) > 1:
        what = f"the engine runs the experts of {name} together, of which only some are quantized"
        raise ConfigError(what, "rollout.ignore", "ignore all of them ('re:.*mlp.experts.*') or none")
    return covered == {True}


def check_engine(scheme: QuantScheme, config: dict[str, Any], dtype: str, device: str) -> None:
    """Raises KernelError when `scheme` covers experts that the engine cannot run on `device`.

    `config` is the content of the model's config.json.
    """
    if not scheme.quantizes or "moe_intermediate_size" not in config:
        return
    lacks = " without AVX-512" if device == "cpu" and not processor.has_avx512() else ""
    low_bit = format_of(scheme).runs_experts(device, getattr(torch, dtype), avx512=not lacks)
    step, dense = config.get("decoder_sparse_step", 1), config.get("mlp_only_layers", ())
    layers = [i for i in range(config["num_hidden_layers"]) if (i + 1) % step == 0 and i not in dense]
    if not low_bit and any(scheme.covers(f"model.layers.{i}.mlp.experts.0.{part}") for i in layers for part in PARTS):
        what = f"vLLM has no known kernel for experts in {scheme.name} with {dtype} on {device}{lacks}"
        hint = "add 're:.*mlp.experts.*' to rollout.ignore: experts then stay in high precision on both sides"
        raise KernelError(what, "rollout.scheme", hint)


class QuantizedExperts(Experts):
    """An expert stack in low precision. Parameters and their names stay the same; gradients go straight through.

        y = sum_k round(w_k down_k(h_k))        h = round(silu(gate_k(x)) * up_k(x))

    where gate, up and down are what a `QuantizedLinear` of the scheme computes, on CPU without rounding its output.

    Args:
        name: for messages.
        kind: the kernel. Where the engine has an op for whole stacks, `engine` and `auto` mean that op; otherwise
            linear kernels compute expert by expert.
    Raises:
        KernelError: no such kernel on the stack's device.
    """

    to_dtype = staticmethod(Tensor.to)  # rounds to nearest: no processor where the engine truncates has low-bit experts

    def __init__(self, stack: Any, name: str, scheme: QuantScheme, kind: KernelKind) -> None:
        super().__init__(stack, engine=False)
        self.name = name
        self.switch(scheme, kind)

    def switch(self, scheme: QuantScheme, kind: KernelKind) -> None:
        """Compute in `scheme` from now on. Raises KernelError as the constructor."""
        device, dtype = self.down_proj.device, self.down_proj.dtype
        self.format_ = format_of(scheme)
        on_cpu, avx512 = device.type == "cpu", processor.has_avx512()
        has_op = on_cpu and self.format_.runs_experts("cpu", dtype, avx512)
        if kind == "engine" and on_cpu and not has_op and self.format_.runs_experts("cpu", dtype, avx512=True):
            what = f"no 'engine' kernel for experts in {scheme.name} on cpu without AVX-512"
            raise KernelError(what, "learner.kernel", "set it to 'auto' or 'torch'")
        self.engine = has_op and kind in ("auto", "engine") and engine_ops.available()
        low_bit_input = self.format_.activation_bits < 16  # weight-only kernels take the model's dtype
        self.wide = torch.float32 if on_cpu and low_bit_input else dtype
        # Beside the engine's op, which has no backward, torch's kernel of the same grid needs no layout of its own.
        self.kernel = choose_kernel(self.format_, device, self.wide, "torch" if self.engine else kind)
        self.requantize()

    def parts(self) -> dict[str, Quantized]:
        """The quantized weight of every projection by its name, `3.up_proj`. Raises KernelError for NaN, infinity."""
        if not self._parts:
            for part, weight in expert_weights(self):
                shared = (self._amax(part),) if self.format_.joint else ()
                try:
                    self._parts[part] = self.format_.quantize(weight, *shared)
                except KernelError as error:
                    raise KernelError(error.what, where=f"{self.name}.{part}", hint=error.hint) from error
        return self._parts

    def quantized(self) -> Quantized:
        """The checkpoint's tensors of the current weights, named from this module on."""
        return {f"{part}.{key}": tensor for part, tensors in self.parts().items() for key, tensor in tensors.items()}

    def requantize(self) -> None:
        """Forget the quantized weights: the masters have changed."""
        self._parts: dict[str, Quantized] = {}
        self._prepared: dict[str, Any] = {}
        self._packed: engine_ops.Int8Experts | None = None

    def mix(self, x_NE: Tensor, ids_NK: Tensor, weights_NK: Tensor) -> Tensor:
        if not self.engine:
            return super().mix(x_NE, ids_NK, weights_NK)
        if self._packed is None:
            parts, experts = self.parts(), len(self.down_proj)
            weights, scales = (stacked(parts, key, experts) for key in ("weight", "weight_scale"))
            self._packed = engine_ops.Int8Experts(weights, scales)
        return self._packed(x_NE, ids_NK, weights_NK)

    def contribution(self, expert: int, x_NE: Tensor, weight_N: Tensor, gate_up_FE: Tensor, down_EI: Tensor) -> Tensor:
        gate, up = gate_up_FE.chunk(2)
        gate_NI = self._linear(f"{expert}.gate_proj", x_NE, gate)
        up_NI = self._linear(f"{expert}.up_proj", x_NE, up)
        inner_NI = (F.silu(gate_NI) * up_NI).to(x_NE.dtype)
        return (self._linear(f"{expert}.down_proj", inner_NI, down_EI) * weight_N[:, None]).to(x_NE.dtype)

    def _linear(self, part: str, x: Tensor, weight: Tensor) -> Tensor:
        if part not in self._prepared:
            self._prepared[part] = self.kernel.prepare(self.parts()[part], None)
        x, weight = x.to(self.wide), weight.to(self.wide)
        return StraightThrough.apply(x, weight, None, self.kernel, self._prepared[part])

    def _amax(self, part: str) -> Tensor:
        """Largest magnitude of the projection and what the engine fuses it with: gate and up of an expert."""
        expert, _, name = part.partition(".")
        fused = self.down_proj if name == "down_proj" else self.gate_up_proj
        return fused[int(expert)].detach().abs().amax()

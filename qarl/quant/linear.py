"""The aligned linear module, and the conversion of a Hugging Face model to it."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from qarl.errors import ConfigError, KernelError
from qarl.numerics.dense import DenseLinear
from qarl.numerics.shards import shards_of
from qarl.quant.experts import QuantizedExperts, covers_experts, expert_stacks, expert_weights
from qarl.quant.format import Format, Kernel, Quantized
from qarl.quant.formats import format_of
from qarl.quant.int8 import finite_amax
from qarl.quant.kernels import StraightThrough, choose_kernel, in_shards
from qarl.quant.scheme import KernelKind, QuantScheme

Gather = Callable[[list[nn.Parameter]], AbstractContextManager[object]]
"""Makes sharded parameters complete within its context (ZeRO-3)."""


def gather_nothing(_: list[nn.Parameter]) -> AbstractContextManager[object]:
    """The `Gather` of models whose parameters are not sharded."""
    return nullcontext()


class QuantizedLinear(nn.Linear):
    """An `nn.Linear` whose forward is the engine's low-bit GEMM. Parameters and their names stay the same.

    The quantized weight is computed at first use and kept until `requantize()`: once per optimizer step, shared by
    every micro-batch, and the very tensors that publication sends.

    `siblings` are the names of the layers that the engine fuses it with, itself included. Where the format is joint
    their largest magnitude is `amax`; `requantize(model, gather)` finds it. `shards` slices of the inputs are computed
    apart, as the processes of a tensor-parallel engine do.
    """

    def __init__(
        self,
        linear: nn.Linear,
        name: str,
        format_: Format,
        kernel: Kernel,
        siblings: tuple[str, ...] = (),
        shards: int = 1,
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.name, self.shards, self.siblings = name, shards, siblings or (name,)
        self.use(format_, kernel)
        self.amax: Tensor | None = None
        self._quantized: Quantized | None = None
        self._prepared: Any = None

    def quantized(self) -> Quantized:
        """The checkpoint's tensors of the current weight, without the bias.

        Raises KernelError: NaN or infinity, or a joint format whose `amax` is not known.
        """
        if self._quantized is None:
            if self.format_.joint and self.amax is None and len(self.siblings) > 1:
                what = f"shares its scale with {', '.join(self.siblings)}, whose largest magnitude was not taken"
                raise KernelError(what, self.name, "call requantize(model, gather)")
            shared = (self.amax,) if self.format_.joint else ()
            try:
                self._quantized = self.format_.quantize(self.weight.detach(), *shared)
            except KernelError as error:
                raise KernelError(error.what, where=self.name, hint=error.hint) from error
        return self._quantized

    def use(self, format_: Format, kernel: Kernel) -> None:
        """Compute in this format from the next `requantize` on."""
        self.format_, self.kernel = format_, in_shards(kernel, self.shards)

    def requantize(self) -> None:
        """Forget the quantized weight: the master has changed."""
        self._quantized = self._prepared = self.amax = None

    def forward(self, input: Tensor) -> Tensor:
        """[..., K] -> [..., N] in the input's dtype."""
        if self._prepared is None:
            bias = None if self.bias is None else self.bias.detach()
            self._prepared = self.kernel.prepare(self.quantized(), bias)
        return StraightThrough.apply(input, self.weight, self.bias, self.kernel, self._prepared)


def align_linears(model: nn.Module, scheme: QuantScheme, kernel: KernelKind = "auto", shards: int = 1) -> list[str]:
    """Replace every linear layer and expert stack that `scheme` covers, in place; returns their names.

    `shards`: processes of the engine, each of which computes a part of every layer.

    Raises:
        ConfigError: as `covered_linears`.
        KernelError: no such kernel on the model's device.
    """
    covered = covered_linears(model, scheme)
    if not covered:
        return []
    format_ = format_of(scheme)
    example = next(model.parameters())
    chosen = choose_kernel(format_, example.device, example.dtype, kernel)
    for name, module in covered.items():
        aligned: nn.Module
        if isinstance(module, nn.Linear):
            siblings = tuple(sibling for sibling in scheme.siblings(name) if sibling in covered)
            aligned = QuantizedLinear(module, name, format_, chosen, siblings, shards_of(name, shards))
        else:
            aligned = QuantizedExperts(module, name, scheme, kernel)
        model.set_submodule(name, aligned)
    requantize(model)
    return list(covered)


def covered_linears(model: nn.Module, scheme: QuantScheme) -> dict[str, nn.Module]:
    """The linear layers and expert stacks that `scheme` quantizes, by name. `model` may be on the meta device.

    Raises ConfigError: an ignore pattern that matches no linear layer, a scheme that covers none, a fused layer or an
    expert stack that is only partly ignored, or a shape that the format does not divide.
    """
    if not scheme.quantizes:
        return {}
    format_, stacks = format_of(scheme), expert_stacks(model)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    shapes = {name: linear.weight.shape for name, linear in linears.items()}
    for name, stack in stacks.items():
        shapes |= {f"{name}.{part}": weight.shape for part, weight in expert_weights(stack)}
    routers = [f"{name.rpartition('.')[0]}.gate" for name in stacks]
    if unmatched := scheme.unmatched([*shapes, *routers]):
        what = f"'{unmatched[0]}' matches no linear layer of the model"
        some = ", ".join(list(shapes)[:3])
        raise ConfigError(what, "rollout.ignore", f"they are named as {some}")
    covered = [name for name in shapes if scheme.covers(name)]
    if not covered:
        raise ConfigError(
            "every linear layer of the model is ignored", "rollout.ignore", "shorten it, or set rollout.scheme=none"
        )
    for name in covered:
        _check(name, shapes, scheme, format_)
    quantized_stacks = {name: stack for name, stack in stacks.items() if covers_experts(scheme, name, stack)}
    return {name: linears[name] for name in covered if name in linears} | quantized_stacks


def switch_scheme(
    model: nn.Module, scheme: QuantScheme, kernel: KernelKind = "auto", gather: Gather = gather_nothing
) -> None:
    """Let the aligned layers of `model`, and no others, compute in another scheme.

    Raises KernelError as `align_linears`.
    """
    format_ = format_of(scheme)
    for _, module in quantized_linears(model):
        module.use(format_, choose_kernel(format_, module.weight.device, module.weight.dtype, kernel))
    for experts in quantized_experts(model):
        experts.switch(scheme, kernel)
    requantize(model, gather)


def _check(name: str, shapes: dict[str, torch.Size], scheme: QuantScheme, format_: Format) -> None:
    for sibling in scheme.siblings(name):
        if sibling in shapes and not scheme.covers(sibling):
            what = f"the engine fuses {name} with {sibling}, of which only one is quantized"
            raise ConfigError(what, "rollout.ignore", "ignore both or none")
    (n, k), fused = shapes[name], [sibling for sibling in scheme.siblings(name) if sibling in shapes]
    for features, multiple, side in (
        (k, format_.k_multiple, "input"),
        (n, format_.n_multiple if name != fused[-1] else 1, "output"),
    ):
        if features % multiple:
            hint = ", or set a rollout.group_size that divides it" if scheme.grouped else ""
            what = f"{scheme.name} needs {side} features divisible by {multiple}, {name} has {features}"
            raise ConfigError(what, "rollout.scheme", f"add '{name}' to rollout.ignore{hint}")


def quantized_linears(model: nn.Module) -> Iterator[tuple[str, QuantizedLinear]]:
    """(name, module) of every aligned linear."""
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            yield name, module


def quantized_experts(model: nn.Module) -> Iterator[QuantizedExperts]:
    """Every aligned expert stack."""
    return (module for module in model.modules() if isinstance(module, QuantizedExperts))


def requantize(model: nn.Module, gather: Gather = gather_nothing) -> None:
    """Forget all quantized weights, and the layouts of dense ones; call it after every optimizer step and every load.

    In joint formats it also finds the largest magnitude of each group of siblings; `gather` completes their weights.
    Raises KernelError: NaN or infinity in such a weight, or a weight that is still sharded.
    """
    layers = {module.name: module for _, module in quantized_linears(model)}
    for layer in layers.values():
        layer.requantize()
    for module in model.modules():
        if isinstance(module, QuantizedExperts):
            module.requantize()
        elif isinstance(module, DenseLinear):
            module.forget()
    for names in dict.fromkeys(layer.siblings for layer in layers.values() if layer.format_.joint):
        group = [layers[name] for name in names]
        with gather([parameter for layer in group for parameter in layer.parameters(recurse=False)]):
            amax = torch.stack([_amax(layer) for layer in group]).max()
        for layer in group:
            layer.amax = amax


def _amax(layer: QuantizedLinear) -> Tensor:
    if layer.weight.numel() != layer.in_features * layer.out_features:
        raise KernelError("its weight is sharded", where=layer.name, hint="give requantize the model's gather")
    try:
        return finite_amax(layer.weight.detach()).max()
    except KernelError as error:
        raise KernelError(error.what, where=layer.name, hint=error.hint) from error

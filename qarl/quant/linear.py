"""The aligned linear module, and the conversion of a Hugging Face model to it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from qarl.errors import ConfigError
from qarl.quant.int8 import W8A8Linear, quantize_weight
from qarl.quant.scheme import QuantScheme


class QuantizedLinear(nn.Linear):
    """An `nn.Linear` whose forward is the engine's low-bit GEMM. Parameters and their names stay the same.

    The quantized weight is computed at first use and kept until `requantize()`: once per optimizer step, shared by
    every micro-batch, and the very tensors that publication sends.
    """

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self._quantized: tuple[Tensor, Tensor] | None = None

    def quantized(self) -> tuple[Tensor, Tensor]:
        """int8 weight [N, K] and float32 scale [N, 1] of the current weight."""
        if self._quantized is None:
            with torch.no_grad():
                self._quantized = quantize_weight(self.weight)
        return self._quantized

    def requantize(self) -> None:
        """Forget the quantized weight: the master has changed."""
        self._quantized = None

    def forward(self, input: Tensor) -> Tensor:
        """[..., K] -> [..., N] in the input's dtype."""
        out: Tensor = W8A8Linear.apply(input, self.weight, self.bias, *self.quantized())
        return out


def align_linears(model: nn.Module, scheme: QuantScheme) -> list[str]:
    """Replace every linear layer that `scheme` covers, in place; returns their names.

    Raises:
        ConfigError: an ignore pattern that matches no linear layer, or a scheme that covers none.
    """
    if not scheme.quantizes:
        return []
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for pattern in scheme.ignore:
        if not any(not QuantScheme(scheme.name, (pattern,)).covers(name) for name in linears):
            raise ConfigError(f"'{pattern}' matches no linear layer of the model", where="rollout.ignore")
    covered = [name for name in linears if scheme.covers(name)]
    if not covered:
        raise ConfigError("every linear layer of the model is ignored", where="rollout.ignore")
    for name in covered:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, QuantizedLinear(linears[name]))
    return covered


def quantized_linears(model: nn.Module) -> Iterator[tuple[str, QuantizedLinear]]:
    """(name, module) of every aligned linear."""
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            yield name, module


def requantize(model: nn.Module) -> None:
    """Call after every optimizer step and every load of weights."""
    for _, module in quantized_linears(model):
        module.requantize()

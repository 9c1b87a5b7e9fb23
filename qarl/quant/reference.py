"""A quantized layer taken apart: its float32 reference with weight or activations off their grids."""

from dataclasses import replace

from torch import nn

from qarl.quant.formats import format_of
from qarl.quant.kernels import choose_kernel
from qarl.quant.linear import quantized_experts, quantized_linears, requantize
from qarl.quant.scheme import QuantScheme


def use_reference(model: nn.Module, scheme: QuantScheme, weight_grid: bool, activation_grid: bool) -> None:
    """Let the aligned linears and experts of `model` compute `A(x) W^T + b` in float32, rounded once to x's dtype.

    Args:
        scheme: the one that `model` is aligned in.
        weight_grid: W lies on the format's grid; otherwise it is the layer's own weight.
        activation_grid: A rounds as the format does; otherwise A(x) = x.
    """
    format_ = format_of(scheme)
    if not weight_grid:
        format_ = replace(format_, quantize=lambda w, *_: {"weight": w}, dequantize=lambda q: q["weight"].float())
    if not activation_grid:
        format_ = replace(format_, round_activation=lambda x: x.float())
    for _, module in quantized_linears(model):
        module.use(format_, choose_kernel(format_, module.weight.device, module.weight.dtype, "reference"))
    for experts in quantized_experts(model):
        experts.format_, experts.engine = format_, False
        experts.kernel = choose_kernel(format_, experts.down_proj.device, experts.wide, "reference")
    requantize(model)

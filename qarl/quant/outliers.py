"""Two identity transforms of a model: outlier channels split, which makes it easier to quantize, or added.

Suffixes: I channels of the MLP's inner layer, E model width.
"""

from typing import Any

import torch
from torch import Tensor, nn

from qarl.errors import ConfigError, ModelError


@torch.no_grad()
def split_outliers(model: Any, channels: int) -> None:
    """Widen every MLP of a Hugging Face causal LM by `channels`, in place, without changing what it computes.

        down(h) = sum_i w_i h_i,   w_j h_j = (w_j / 2) h_j + (w_j / 2) h_j

    In each layer the inner channel whose down-projection holds the largest weight is doubled and its column halved,
    `channels` times over, so that a channel may be split again. Its rows of gate and up are repeated. Halving is exact
    in binary floating point; only the order of the sum changes. `config.intermediate_size` grows by `channels`.

    Raises:
        ConfigError: `channels` is not positive.
        ModelError: the model's MLPs are not gate/up/down.
    Source: Zhao et al., arXiv 1901.09504 (outlier channel splitting); Bit-by-Bit uses it before low-bit stages.
    """
    if not hasattr(model.base_model, "layers"):
        raise ModelError(f"{type(model).__name__} has no layers with gate, up and down projections")
    if channels < 1:
        raise ConfigError(f"cannot split {channels} channels", hint="give a positive number")
    for index, layer in enumerate(getattr(model.base_model, "layers", ())):
        mlp: Any = getattr(layer, "mlp", None)
        if not all(isinstance(getattr(mlp, f"{part}_proj", None), nn.Linear) for part in ("gate", "up", "down")):
            raise ModelError(f"the MLP of layer {index} is not gate, up and down projections")
        source_I, down_EI = _split(mlp.down_proj.weight, channels)
        for linear in (mlp.gate_proj, mlp.up_proj):
            _replace(linear, linear.weight[source_I])
            if linear.bias is not None:
                linear.bias = nn.Parameter(linear.bias[source_I])
        _replace(mlp.down_proj, down_EI)
        mlp.intermediate_size = len(source_I)
    model.config.intermediate_size += channels


@torch.no_grad()
def add_outliers(model: Any, bits: int) -> None:
    """Give a small model the outlier channels that large ones have, in place, without changing what it computes.

    In every layer the two largest inputs of the attention, of the MLP and of its down-projection become 2^bits times
    as large, and the weights that read them are divided by it: exact in binary floating point. On a grid that
    the largest input sets, the others lose up to `bits` bits. `model` has Llama's or Qwen3's layers, the MLP without
    biases.

    Source: Xiao et al., arXiv 2211.10438 (SmoothQuant), whose transform this is, the other way round.
    """
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        queries_keys_values = attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight
        for writer, readers in (
            (layer.input_layernorm.weight, queries_keys_values),
            (layer.post_attention_layernorm.weight, (mlp.gate_proj.weight, mlp.up_proj.weight)),
            (mlp.up_proj.weight, (mlp.down_proj.weight,)),
        ):
            largest = writer.view(len(writer), -1).norm(dim=1).topk(2).indices
            writer[largest] *= 2.0**bits
            for reader in readers:
                reader[:, largest] /= 2.0**bits


def _split(down_EI: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """(which old channel each new one repeats, new weight)."""
    source = list(range(down_EI.shape[1]))
    columns = list(down_EI.unbind(1))
    peak_I = down_EI.abs().amax(0).tolist()
    for _ in range(channels):
        widest = max(range(len(peak_I)), key=peak_I.__getitem__)
        columns[widest] = columns[widest] / 2
        columns.append(columns[widest])
        peak_I[widest] /= 2
        peak_I.append(peak_I[widest])
        source.append(source[widest])
    return torch.tensor(source, device=down_EI.device), torch.stack(columns, 1)


def _replace(linear: nn.Linear, weight: Tensor) -> None:
    linear.weight = nn.Parameter(weight.contiguous())
    linear.out_features, linear.in_features = weight.shape

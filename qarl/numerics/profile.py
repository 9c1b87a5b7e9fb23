"""Numerics profiles: how the learner rounds. `engine` is exact on CPU, `portable` pure torch, `stock` transformers."""

from typing import Any

import torch
from torch import nn

from qarl.errors import KernelError, ModelError
from qarl.numerics import engine_ops
from qarl.numerics.dense import DenseLinear
from qarl.numerics.layers import DecoderLayer, Norm, Rotary
from qarl.numerics.moe import SparseMoe
from qarl.numerics.shards import shards_of
from qarl.types import Numerics

SUPPORTED_MODELS = ("llama", "qwen2", "qwen3", "qwen3_moe")
LENGTH_DEPENDENT_ROPES = ("dynamic", "longrope")  # their frequencies change with the longest sequence of a batch


def apply_profile(model: Any, numerics: Numerics, device: torch.device, shards: int = 1) -> None:
    """Give a Hugging Face causal LM the engine's roundings, in place. Parameter names stay the same.

    `shards`: processes of the engine, which `engine` numerics follow in dense layers.


    Raises:
        ModelError: an architecture, or a variant of attention or RoPE, that the profile does not cover.
        KernelError: `engine` on a device other than CPU, or without vLLM.
    """
    if numerics == "stock":
        return
    config = model.config
    if config.model_type not in SUPPORTED_MODELS:
        what = f"numerics '{numerics}' covers {', '.join(SUPPORTED_MODELS)}, not {config.model_type}"
        raise ModelError(what, hint="set learner.numerics=stock")
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        what = f"numerics '{numerics}' does not cover sliding-window attention"
        raise ModelError(what, hint="set learner.numerics=stock")
    rope_type = config.rope_parameters["rope_type"]
    if rope_type in LENGTH_DEPENDENT_ROPES:
        raise ModelError(f"numerics '{numerics}' does not cover '{rope_type}' RoPE", hint="set learner.numerics=stock")
    if numerics == "engine":
        if device.type != "cpu":
            raise KernelError(f"numerics 'engine' runs on CPU, not on {device}", hint="set learner.numerics=portable")
        engine_ops.ops()
        for name, module in list(model.named_modules()):
            if type(module) is nn.Linear:
                model.set_submodule(name, DenseLinear(module, shards_of(name, shards)))
    decoder = model.model
    decoder.norm = Norm(decoder.norm)
    decoder.rotary_emb = Rotary(decoder.rotary_emb)
    for index, layer in enumerate(decoder.layers):
        decoder.layers[index] = DecoderLayer(layer)
        if hasattr(layer.mlp, "experts"):
            decoder.layers[index].mlp = SparseMoe(layer.mlp, engine=numerics == "engine")

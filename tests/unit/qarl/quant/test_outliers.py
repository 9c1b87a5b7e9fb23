"""Outlier-channel splitting is an identity, bit for bit where sums are exact, and flattens what is quantized."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from launch.cli import main
from qarl.errors import ConfigError, ModelError
from qarl.quant import int4
from qarl.quant.outliers import add_outliers, split_outliers


def tiny(inner: int = 24) -> Any:
    torch.manual_seed(0)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 2, "vocab_size": 16}
    return LlamaForCausalLM(LlamaConfig(hidden_size=16, intermediate_size=inner, mlp_bias=True, **heads)).double()


@given(channels=st.integers(1, 60), seed=st.integers(0, 2**32))
@settings(max_examples=25)
def test_down_projection_is_the_same_sum(channels: int, seed: int) -> None:
    """Integer weights and inputs: every product and sum is exact, so equality is bitwise."""
    model = tiny()
    mlp = model.model.layers[0].mlp
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        mlp.down_proj.weight.copy_(torch.randint(-9, 10, (16, 24), generator=generator))
    h = torch.randint(-50, 50, (5, 24), generator=generator).double()
    before = mlp.down_proj(h)
    rows = mlp.up_proj.weight.detach().clone()
    split_outliers(model, channels)
    source = [next(i for i, row in enumerate(rows) if torch.equal(row, new)) for new in mlp.up_proj.weight]
    assert len(source) == 24 + channels
    assert torch.equal(mlp.down_proj(h[:, source]), before)


def test_the_model_computes_the_same() -> None:
    model = tiny()
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        for layer in model.model.layers:
            for linear in (layer.mlp.gate_proj, layer.mlp.up_proj):
                nn.init.normal_(linear.bias)
        before = model(ids).logits
        split_outliers(model, 8)
        assert (model.config.intermediate_size, model.model.layers[1].mlp.down_proj.in_features) == (32, 32)
        torch.testing.assert_close(model(ids).logits, before, rtol=1e-12, atol=1e-12)


def test_the_largest_weight_is_halved_until_another_is_larger() -> None:
    model = tiny()
    down = model.model.layers[0].mlp.down_proj
    with torch.no_grad():
        down.weight.fill_(1.0)
        down.weight[3, 5] = 8.0
    split_outliers(model, 3)  # 8 -> 4, 4 -> 2, 2, 4 -> 2, 2: four copies of a quarter
    assert down.weight[3, [5, 24, 25, 26]].tolist() == [2.0] * 4
    assert down.weight.abs().max() == 2.0


def test_a_saved_model_loads_again(tmp_path: Any) -> None:
    model = tiny()
    split_outliers(model, 8)
    model.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))


def test_int4_loses_less_of_a_weight_with_outliers() -> None:
    model = tiny(inner=32)
    down = model.model.layers[0].mlp.down_proj
    with torch.no_grad():
        down.weight[:, 5] *= 16
    weight, rows = down.weight.detach().clone(), model.model.layers[0].mlp.up_proj.weight.detach().clone()

    def rounded(linear: nn.Linear) -> torch.Tensor:
        return int4.dequantize(*int4.quantize_weight(linear.weight.float(), 32))

    error = (rounded(down) - weight).pow(2).sum()
    split_outliers(model, 32)
    merged = torch.zeros_like(weight)
    for column, row in zip(rounded(down).t(), model.model.layers[0].mlp.up_proj.weight, strict=True):
        merged[:, next(i for i, old in enumerate(rows) if torch.equal(old, row))] += column
    assert (merged - weight).pow(2).sum() < error / 2


def test_added_outliers_change_no_bit_of_the_function() -> None:
    model, ids = tiny().float(), torch.arange(12).view(2, 6)
    inputs: dict[str, torch.Tensor] = {}
    mlp = model.model.layers[1].mlp
    for name in ("gate_proj", "down_proj"):
        getattr(mlp, name).register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0]}))
    with torch.no_grad():
        nn.init.zeros_(mlp.up_proj.bias)
        before, seen = model(ids).logits, dict(inputs)
        add_outliers(model, 6)
        assert torch.equal(model(ids).logits, before)
    for name, old in seen.items():
        channels = inputs[name].flatten(0, 1).ne(old.flatten(0, 1)).any(0).nonzero().flatten()
        assert len(channels) == 2
        assert torch.equal(inputs[name][..., channels], 64 * old[..., channels])


def test_bad_input() -> None:
    with pytest.raises(ConfigError, match="cannot split 0 channels"):
        split_outliers(tiny(), 0)
    model = tiny()
    model.model.layers[1].mlp = nn.Linear(16, 16)
    with pytest.raises(ModelError, match="the MLP of layer 1 is not gate, up and down"):
        split_outliers(model, 2)


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox", "opt"])
def test_other_wrappers_are_refused_by_name(kind: str) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 16}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes))
    with pytest.raises(ModelError, match="gate, up and down projections"):
        split_outliers(model, 2)


def test_the_command_splits_no_more_channels_than_there_are(
    tiny_models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["split-outliers", str(tiny_models["qwen3"]), str(tmp_path / "out"), "--channels", "100000"]) == 2
    assert "--channels: 100000 is more than the model's 512 inner channels" in capsys.readouterr().err


def test_the_command_writes_a_model_that_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from launch.demo.tiny_model import make_tokenizer

    source, out = str(tmp_path / "model"), str(tmp_path / "split")
    tiny().bfloat16().save_pretrained(source)
    make_tokenizer(16).save_pretrained(source)
    assert main(["split-outliers", source, out, "--channels", "8"]) == 0
    assert "intermediate_size 24 -> 32" in capsys.readouterr().out
    assert LlamaForCausalLM.from_pretrained(out).config.intermediate_size == 32
    assert main(["split-outliers", source, out, "--channels", "8"]) == 2
    assert f"{out} exists; name a new folder" in capsys.readouterr().err
    assert main(["split-outliers", str(tmp_path), f"{out}2", "--channels", "8"]) == 2
    assert "holds no config.json" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert main(["split-outliers", source, str(tmp_path / "file" / "out"), "--channels", "8"]) == 2
    assert "file/out: cannot be written: " in capsys.readouterr().err

"""The float formats in vLLM: its own functions for what no kernel here runs, its engine on CPU for fp8_channel."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.kernels import linear as vllm_kernels
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
from vllm.model_executor.layers.quantization.input_quant_fp8 import QuantFP8
from vllm.model_executor.layers.quantization.utils import w8a8_utils
from vllm.model_executor.layers.quantization.utils.nvfp4_emulation_utils import ref_nvfp4_quant_dequant
from vllm.model_executor.layers.quantization.utils.quant_utils import GroupShape

from qarl.config.policy import RolloutConfig
from qarl.numerics.vllm_patch import patch_cpu, patch_cpu_engine
from qarl.quant import fp4, fp8
from qarl.quant.formats import format_of, quantization_config
from qarl.quant.parity import check_parity
from qarl.quant.publish import checkpoint_tensors, publish, write_checkpoint, write_engine_config
from qarl.quant.scheme import FloatScheme, QuantScheme, SchemeName
from rollout.engine import VLLMEngine
from tests.support.real_engine import gap, perturbed, requests, stock_vllm
from trainer.policy import Policy

CHANNEL = QuantScheme("fp8_channel")


@pytest.mark.parametrize("name", sorted(set(get_args(SchemeName)) - {"none"}))
def test_kernels_are_vllms(name: SchemeName) -> None:
    kernels = format_of(QuantScheme(name)).engine_kernels
    assert kernels
    assert all(hasattr(vllm_kernels, kernel.name) for kernel in kernels)


@pytest.mark.parametrize("name", get_args(FloatScheme))
def test_vllm_takes_the_config_for_what_it_is(name: SchemeName) -> None:
    scheme = QuantScheme(name, ("lm_head", r"re:.*\.0\..*"))
    config = CompressedTensorsConfig.from_config(quantization_config(scheme))
    assert config.ignore == scheme.library_ignore()
    group: dict[str, Any] = config.target_scheme_map["Linear"]
    weights, inputs = group["weights"], group["input_activations"]
    assert config._is_fp8_w8a8(weights, inputs) == name.startswith("fp8")
    assert config._is_mxfp4(weights) == name.startswith("mx")
    assert config._is_nvfp4_format(weights) == name.startswith("nv")
    assert (inputs is None) == name.endswith("a16")
    if name == "nvfp4":
        assert config._is_nvfp4_format(inputs)


def cpu_static_fp8_quant(x: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """vLLM's CUDA op `static_scaled_fp8_quant`, which its CPU build lacks."""
    return (x.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn), scale


@pytest.mark.parametrize("size", [0.02, 0.5, 30.0])
def test_the_engines_union_of_shared_scales_is_the_identity(size: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the shared magnitude it would be a second rounding."""
    monkeypatch.setattr(w8a8_utils.ops, "scaled_fp8_quant", cpu_static_fp8_quant)
    generator = torch.Generator().manual_seed(0)
    widths = [64, 32, 32]
    parts = [torch.randn(n, 128, generator=generator) * size * (i + 1) for i, n in enumerate(widths)]
    amax = torch.cat(parts).abs().amax()
    for shared in (amax, None):
        quantized, scales = zip(*(fp8.quantize_tensor(part, shared) for part in parts), strict=True)
        before = torch.cat([q.view(torch.uint8) for q in quantized]).view(torch.float8_e4m3fn)
        scale, after = w8a8_utils.requantize_with_max_scale(before.clone(), torch.cat(scales), widths)
        assert scale == amax / 448
        assert torch.equal(after.float(), before.float()) == (shared is not None)


def test_activation_grids_are_vllms() -> None:
    x = (torch.randn(9, 256, generator=torch.manual_seed(0)) * torch.logspace(-8, 3, 9)[:, None]).bfloat16()
    with set_current_vllm_config(VllmConfig()):
        token = QuantFP8(static=False, group_shape=GroupShape.PER_TOKEN)
        group = QuantFP8(static=False, group_shape=GroupShape(1, 128), use_ue8m0=False)
    for theirs, ours in ((token, fp8.quantize_activation(x)), (group, fp8.quantize_activation_groups(x))):
        q, scale = theirs.forward_native(x)
        assert torch.equal(ours[0].view(torch.uint8), q.view(torch.uint8))
        assert torch.equal(ours[1], scale)
    for one in (fp4.INPUT_GLOBAL_SCALE, 37.0):
        assert torch.equal(fp4.round_nv(x, one), ref_nvfp4_quant_dequant(x.float(), torch.tensor([one]), 16))


def test_parity_names_the_format(tiny_models: dict[str, Path]) -> None:
    from transformers import AutoConfig

    checks = check_parity(AutoConfig.from_pretrained(tiny_models["qwen3"]), torch.bfloat16, CHANNEL, "torch")
    assert "fp8_channel linear exact" in map(str, checks)


@pytest.mark.parametrize("tokens", [1, 3, 20])
def test_the_engines_fp8_layer_is_ours_in_any_batch(tokens: int) -> None:
    """Wide enough that MKL's sums would depend on the batch."""
    patch_cpu()
    patch_cpu_engine()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 2048, generator=generator).bfloat16()
    q_NK, scale_N1 = fp8.quantize_channels(torch.randn(96, 2048, generator=generator))
    q_x, scale_x = fp8.quantize_activation(x[:tokens])
    theirs = vllm_kernels.ChannelWiseTorchFP8ScaledMMLinearKernel.apply_scaled_mm(
        None,
        **{"A": q_x, "B": q_NK.t(), "out_dtype": torch.bfloat16, "As": scale_x, "Bs": scale_N1, "bias": None},
        output_shape=[tokens, 96],
    )
    assert torch.equal(theirs, fp8.w8a8_forward(x, q_NK, scale_N1, None)[:tokens])


@pytest.mark.parametrize("kind", ["qwen3", "qwen2"])
def test_fp8_channel_is_exact_and_reloads_as_it_starts(kind: str, tiny_models: dict[str, Path], tmp_path: Path) -> None:
    """Qwen2 has biases. The second engine is stock `vllm.LLM(path)`, in a process whose torch has oneDNN off."""
    write_engine_config(tmp_path / "config", tiny_models[kind], CHANNEL)
    engine = VLLMEngine(tmp_path / "config", RolloutConfig(max_model_len=256), CHANNEL, "bfloat16", "cpu")
    assert engine.info().kernels == ("ChannelWiseTorchFP8ScaledMMLinearKernel",)
    policy = Policy(tiny_models[kind], torch.bfloat16, CHANNEL, "engine")
    engine.load(publish(policy.model, CHANNEL, 1))
    assert gap(policy, engine.generate(requests(24, 80))).abs_max == 0.0
    changed = perturbed(policy, CHANNEL)
    engine.load(publish(changed.model, CHANNEL, 2))
    samples = engine.generate(requests(8, 40))
    assert gap(changed, samples).abs_max == 0.0
    assert gap(policy, samples).abs_max > 0.0
    if kind == "qwen2":
        return
    write_checkpoint(checkpoint_tensors(changed.model), tmp_path / "fresh", tiny_models[kind], CHANNEL)
    asked = [(list(s.prompt.token_ids), i) for i, s in enumerate(samples)]
    fresh = stock_vllm(tmp_path / "fresh", asked, tokens=40, first="torch.backends.mkldnn.set_flags(False)")
    assert [tokens for tokens, _ in fresh] == [list(s.response_ids) for s in samples]
    for (_, logprobs), sample in zip(fresh, samples, strict=True):
        assert np.array_equal(np.float32(logprobs), sample.logprobs_T)

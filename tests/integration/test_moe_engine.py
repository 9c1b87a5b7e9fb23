"""Qwen3-MoE: the learner against the real engine, bit for bit, with experts in high and in low precision."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from qarl.config.policy import RolloutConfig
from qarl.errors import KernelError
from qarl.numerics import processor
from qarl.quant.linear import requantize
from qarl.quant.parity import check_parity
from qarl.quant.publish import checkpoint_tensors, publish, write_checkpoint, write_engine_config
from qarl.quant.scheme import QuantScheme
from rollout.engine import VLLMEngine
from tests.support.hosts import EXACT_W8A8, needs_avx512
from tests.support.real_engine import gap, requests
from trainer.policy import Policy

LINEAR, EXPERTS = "CPUInt8ScaledMMLinearKernel", "CPUExpertsInt8"
SCHEMES = {
    "none": (QuantScheme("none"), ()),
    "attention": (QuantScheme(ignore=("lm_head", "re:.*mlp.experts.*")), (LINEAR,)),
    "all": (QuantScheme(), (EXPERTS, LINEAR)),
}
TOKENS = 100


@pytest.fixture
def groups_with_experts() -> None:
    """vLLM makes its process groups once in a process, without one for experts when the first model has none.

    The engine that is started next makes them again, for those of before, too.
    """
    from vllm.distributed import destroy_model_parallel

    destroy_model_parallel()


@pytest.fixture(scope="module")
def model_dir(tiny_models: dict[str, Path]) -> Path:
    return tiny_models["qwen3_moe"]


def changed(policy: Policy) -> None:
    """Other weights, as after an optimizer step."""
    generator = torch.manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1 + 0.05 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    requantize(policy)


def fresh_samples(path: Path, asked: list[tuple[list[int], int]]) -> list[tuple[list[int], np.ndarray]]:
    """Tokens and log-probs of a vLLM that reads the checkpoint at its start."""
    from vllm import LLM, SamplingParams

    llm = LLM(str(path), dtype="bfloat16", enforce_eager=True, max_model_len=768, max_num_seqs=64, block_size=128)
    params = [SamplingParams(temperature=1.0, max_tokens=TOKENS, seed=seed, logprobs=0) for _, seed in asked]
    outputs = llm.generate([{"prompt_token_ids": ids} for ids, _ in asked], params, use_tqdm=False)
    first = [output.outputs[0] for output in outputs]
    return [
        (list(o.token_ids), np.float32([e[t].logprob for t, e in zip(o.token_ids, o.logprobs, strict=True)]))
        for o in first
    ]


@pytest.mark.parametrize("name", ["none", "attention", pytest.param("all", marks=needs_avx512)])
@pytest.mark.usefixtures("groups_with_experts")
def test_mismatch_is_zero_and_reloaded_is_fresh(name: str, model_dir: Path, tmp_path: Path) -> None:
    scheme, kernels = SCHEMES[name]
    write_engine_config(tmp_path / "engine", model_dir, scheme)
    engine = VLLMEngine(tmp_path / "engine", RolloutConfig(max_model_len=768), scheme, "bfloat16", "cpu")
    assert engine.info().kernels == kernels
    policy = Policy(model_dir, torch.bfloat16, scheme, "engine")
    engine.load(publish(policy.model, scheme, 1))
    before = engine.generate(requests(24, TOKENS))
    assert gap(policy, before).abs_max == 0.0
    portable, stock = (
        gap(Policy(model_dir, torch.bfloat16, scheme, numerics, kernel=EXACT_W8A8), before)
        for numerics in ("portable", "stock")
    )
    # A router's choice that falls the other way moves a log-prob by tenths: there is no small bound on the maximum.
    assert 0 < portable.abs_mean < 0.6 * stock.abs_mean
    changed(policy)
    engine.load(publish(policy.model, scheme, 2))
    samples = engine.generate(requests(24, TOKENS))
    assert gap(policy, samples).abs_max == 0.0
    assert gap(policy, before).abs_max > 0.0  # the engine does hold the new weights
    one = engine.generate(requests(24, TOKENS)[:1])[0]
    assert np.array_equal(one.logprobs_T, samples[0].logprobs_T), "a token's value depends on its batch"
    write_checkpoint(checkpoint_tensors(policy.model), tmp_path / "fresh", model_dir, scheme)
    fresh = fresh_samples(tmp_path / "fresh", [(list(s.prompt.token_ids), i) for i, s in enumerate(samples)])
    for (tokens, logprobs_T), sample in zip(fresh, samples, strict=True):
        assert tokens == list(sample.response_ids)
        assert np.array_equal(logprobs_T, sample.logprobs_T)


@pytest.mark.parametrize("name", ["none", "attention", pytest.param("all", marks=needs_avx512)])
def test_every_op_of_this_host_equals_the_engines(name: str, model_dir: Path) -> None:
    scheme, _ = SCHEMES[name]
    policy = Policy(model_dir, torch.bfloat16, scheme, "engine")
    checks = check_parity(policy.model.config, torch.bfloat16, scheme)
    assert {"router", "experts"} < {check.op for check in checks}
    assert all(check.exact for check in checks), list(map(str, checks))


def test_experts_without_a_kernel_are_an_error_that_names_the_pattern(model_dir: Path, tmp_path: Path) -> None:
    scheme = QuantScheme("w4a16" if processor.has_avx512() else "w4a8", group_size=32)
    write_engine_config(tmp_path, model_dir, scheme)
    with pytest.raises(
        KernelError, match=rf"no known kernel for experts in {scheme.name}.*add 're:\.\*mlp\.experts\.\*' to rollout"
    ):
        VLLMEngine(tmp_path, RolloutConfig(max_model_len=64), scheme, "bfloat16", "cpu")

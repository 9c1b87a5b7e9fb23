"""Samples of plain `vllm.LLM(path)`, which an exported checkpoint is compared with."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qarl.config.policy import RolloutConfig
from qarl.numerics.engine_ops import BLOCK_SIZE
from qarl.numerics.vllm_patch import patch_cpu, patch_cpu_engine
from qarl.quant.scheme import QuantScheme
from qarl.types import SampleRequest
from qarl.weights.source import WeightSource
from rollout.engine import VLLMEngine

Sampled = list[tuple[list[int], list[float]]]
"""Token ids and log-probs of each response."""


def sample_stock(
    path: Path, config: RolloutConfig, dtype: str, device: str, requests: Sequence[SampleRequest]
) -> Sampled:
    """Sample from the weights on disk; on CPU with the kernels of a rollout worker. Run it in a process of its own."""
    settings: dict[str, Any] = {"gpu_memory_utilization": config.gpu_memory_utilization}
    if device == "cpu":
        patch_cpu()
        patch_cpu_engine()
        settings = {"block_size": BLOCK_SIZE, "enable_chunked_prefill": False}
    from vllm import LLM, SamplingParams

    llm = LLM(
        str(path),
        dtype=dtype,
        enforce_eager=device == "cpu",
        max_model_len=config.max_model_len,
        max_num_seqs=config.max_num_seqs,
        logprobs_mode="processed_logprobs",
        disable_log_stats=True,
        seed=0,
        **settings,
    )
    params = [
        SamplingParams(temperature=r.temperature, max_tokens=r.max_new_tokens, seed=r.seed, logprobs=0, ignore_eos=True)
        for r in requests
    ]
    prompts = [{"prompt_token_ids": list(request.prompt.token_ids)} for request in requests]
    answers = [output.outputs[0] for output in llm.generate(prompts, params, use_tqdm=False)]
    return [
        (list(a.token_ids), [entry[token].logprob for token, entry in zip(a.token_ids, a.logprobs, strict=True)])
        for a in answers
    ]


def sample_published(
    weights: WeightSource,
    path: Path,
    config: RolloutConfig,
    scheme: QuantScheme,
    dtype: str,
    device: str,
    requests: Sequence[SampleRequest],
) -> Sampled:
    """Sample as a rollout worker that has loaded `weights`. Run it in a process of its own. `path` has the config."""
    engine = VLLMEngine(path, config, scheme, dtype, device)
    engine.load(weights)
    return [(list(s.response_ids), [float(x) for x in s.logprobs_T]) for s in engine.generate(requests)]

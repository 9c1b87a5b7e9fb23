"""What tests of a real engine share: requests, the learner's log-probs, and plain vLLM in another process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from launch.demo.tiny_model import make_tokenizer
from qarl.config.task import SortingTaskConfig
from qarl.mismatch import Mismatch
from qarl.quant.linear import requantize
from qarl.quant.scheme import QuantScheme
from qarl.tasks.turns import TurnEncoder
from qarl.types import EnvironmentTurn, Prompt, Sample, SampleRequest, TrainSequence
from qarl.weights.source import WeightSource
from rollout.conversations import ConversingFleet
from tests.support.fakes import FakeFleet
from trainer.batching import Batch
from trainer.policy import Policy

if TYPE_CHECKING:
    from rollout.engine import VLLMEngine

SCHEME = QuantScheme()


def requests(count: int, tokens: int, seed: int = 0, before: int = 0) -> list[SampleRequest]:
    """For responses to random prompts of `before` + 3 to 40 tokens."""
    rng = np.random.default_rng(seed)
    prompts = [
        Prompt(str(i), "", "", tuple(int(t) for t in rng.integers(4, 256, before + rng.integers(3, 40))))
        for i in range(count)
    ]
    return [SampleRequest(prompt, i, 1.0, tokens) for i, prompt in enumerate(prompts)]


class Parrot:
    """Environments that give a few random token ids after each response."""

    def __init__(self, tokens: int) -> None:
        self._tokens, self._rng = tokens, np.random.default_rng(1)

    def reset(self, prompts: Mapping[int, Prompt]) -> dict[int, EnvironmentTurn]:
        return dict.fromkeys(prompts, EnvironmentTurn())

    def step(self, responses: Mapping[int, str]) -> dict[int, EnvironmentTurn]:
        return {i: EnvironmentTurn(self._rng.integers(4, 256, self._tokens + i).tolist()) for i in responses}

    def end(self, numbers: Iterable[int]) -> None:
        pass

    def close(self) -> None:
        pass


class OneEngine(FakeFleet):
    """A fleet of one real engine. Every response has full length and counts as complete, so conversations go on."""

    def __init__(self, engine: VLLMEngine) -> None:
        super().__init__()
        self._engine = engine

    def sample(self, requests: Sequence[SampleRequest]) -> list[Sample]:
        samples = self._engine.generate([replace(request, ignore_eos=True) for request in requests])
        return [replace(sample, finish_reason="stop") for sample in samples]


def conversing(engine: VLLMEngine, turns: int, given: int) -> ConversingFleet:
    """For conversations of at most 1,024 tokens, `given` or more of them between two turns."""
    encoder = TurnEncoder(make_tokenizer(256), SortingTaskConfig())
    return ConversingFleet(OneEngine(engine), Parrot(given), encoder, turns, 1024)


def partial_samples(
    engine: VLLMEngine, weights: Sequence[WeightSource], asked: Sequence[SampleRequest], steps: int
) -> list[Sample]:
    """Responses that go on under each of the `weights` after `steps` tokens of the ones before."""
    engine.load(weights[0])
    engine.add({number: replace(request, partial=True) for number, request in enumerate(asked)})
    samples: dict[int, Sample] = {}
    for newer in weights[1:]:
        for _ in range(steps):
            samples |= engine.step()
        engine.load(newer)
    while len(samples) < len(asked):
        samples |= engine.step()
    return [samples[number] for number in range(len(asked))]


def learner_logprobs(
    policy: Policy, samples: Sequence[Sample], version: int | None = None, as_one: bool = False
) -> list[np.ndarray]:
    sequences = [TrainSequence.of(s) for s in samples]
    rows = [replace(s, sampled_T=None, versions_T=None) for s in sequences] if as_one else sequences
    with torch.no_grad():
        logp_BT = policy(Batch.of(rows, torch.device("cpu"))).logprobs_BT
    return [s.at_sampled(logp_BT[row, : len(s.response_ids)].numpy(), version) for row, s in enumerate(sequences)]


def gap(policy: Policy, samples: Sequence[Sample], version: int | None = None, as_one: bool = False) -> Mismatch:
    """Over all sampled tokens, or those of weights `version`. `as_one`: with a learner that knows no turns or segments,
    and decodes all tokens of a response."""
    sampler = [TrainSequence.of(s).at_sampled(s.logprobs_T, version) for s in samples]
    return Mismatch.between(learner_logprobs(policy, samples, version, as_one), sampler)


def perturbed(policy: Policy, scheme: QuantScheme = SCHEME, seed: int = 1) -> Policy:
    changed = Policy(policy.model.config._name_or_path, policy.model.dtype, scheme, "engine")
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.mul_(1 + 0.02 * torch.randn_like(parameter))
    requantize(changed)
    return changed


STOCK = """
import json, os, sys, torch
from qarl.numerics.vllm_patch import patch_cpu, patch_cpu_engine
patch_cpu()
patch_cpu_engine()
FIRST
from vllm import LLM, SamplingParams
path, tokens, asked = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
llm = LLM(path, dtype="bfloat16", enforce_eager=True, max_model_len=768, max_num_seqs=64, block_size=128)
params = [SamplingParams(temperature=1.0, max_tokens=tokens, seed=seed, logprobs=0) for _, seed in asked]
outputs = llm.generate([{"prompt_token_ids": ids} for ids, _ in asked], params, use_tqdm=False)
first = [o.outputs[0] for o in outputs]
rows = [(list(o.token_ids), [e[t].logprob for t, e in zip(o.token_ids, o.logprobs)]) for o in first]
print("RESULT" + json.dumps(rows), flush=True)
"""


def stock_vllm(
    path: Path, asked: list[tuple[list[int], int]], tokens: int, first: str = ""
) -> list[tuple[list[int], list[float]]]:
    """Sample with `vllm.LLM(path)`, on a worker's kernels, in a new process that begins with the statement `first`."""
    command = [sys.executable, "-c", STOCK.replace("FIRST", first), str(path), str(tokens), json.dumps(asked)]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ), timeout=300)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    assert lines, done.stdout[-2000:] + done.stderr[-2000:]
    rows: list[tuple[list[int], list[float]]] = json.loads(lines[0].removeprefix("RESULT"))
    return rows

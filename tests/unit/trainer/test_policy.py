"""The policy's log-probs against transformers, and the batches that feed it."""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer

from qarl.errors import ModelError
from qarl.quant.linear import quantized_linears, requantize
from qarl.quant.scheme import QuantScheme
from qarl.types import Numerics, TrainSequence
from trainer.batching import Batch
from trainer.policy import Policy, entropy_of

CPU = torch.device("cpu")
PLAIN, W8A8 = QuantScheme("none"), QuantScheme()
KINDS = ("qwen3", "qwen2", "llama", "qwen3_moe")
LENGTHS = [(3, (5, 2)), (6, (1, 3)), (1, (4, 4))]  # prompt, two responses to it


def sequences() -> list[TrainSequence]:
    rng = np.random.default_rng(0)
    return [
        TrainSequence(prompt, tuple(rng.integers(4, 256, length)), np.zeros(length, np.float32))
        for prompt, lengths in ((tuple(rng.integers(4, 256, p)), r) for p, r in LENGTHS)
        for length in lengths
    ]


def batch() -> Batch:
    return Batch.of(sequences(), CPU)


def policy(
    path: Path,
    numerics: Numerics,
    scheme: QuantScheme = PLAIN,
    temperature: float = 1.0,
    dtype: torch.dtype | None = None,
) -> Policy:
    return Policy(path, dtype or torch.float32, scheme, numerics, temperature)


def response_log_probs(path: Path, temperature: float) -> list[Tensor]:
    """Plain transformers, one sequence at a time without padding."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    out = []
    for sequence in sequences():
        ids = torch.tensor([sequence.prompt_ids + sequence.response_ids])
        with torch.no_grad():
            logp_LV = torch.log_softmax(model(ids).logits[0].double() / temperature, -1)
        first = len(sequence.prompt_ids)
        out.append(logp_LV[first - 1 : -1].gather(1, ids[0, first:, None]).squeeze(1))
    return out


@pytest.mark.parametrize("mode", ["value", "gradient"])
def test_entropy_is_the_distributions_and_leaves_log_probs_alone(
    tiny_models: dict[str, Path], mode: Literal["value", "gradient"], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.policy.DENSE_ROWS", 4)  # nineteen tokens: five chunks
    monkeypatch.setattr("trainer.policy.Policy.head_elements", 0)
    entropies = Mock(side_effect=entropy_of)
    monkeypatch.setattr("trainer.policy.entropy_of", entropies)
    learner = policy(tiny_models["qwen3"], "portable", temperature=0.7)
    plain_BT, none = learner(batch())
    logp_BT, entropy_BT = learner(batch(), mode)
    assert torch.equal(logp_BT, plain_BT)
    assert none is None
    assert entropy_BT is not None
    model = AutoModelForCausalLM.from_pretrained(tiny_models["qwen3"], dtype=torch.float32)
    for row, sequence in enumerate(sequences()):
        ids = torch.tensor([sequence.prompt_ids + sequence.response_ids])
        logits_LV = model(ids).logits[0, len(sequence.prompt_ids) - 1 : -1].double() / 0.7
        expected_T = torch.distributions.Categorical(logits=logits_LV).entropy()
        torch.testing.assert_close(entropy_BT[row, : len(expected_T)].double(), expected_T, rtol=0, atol=1e-4)
        assert not entropy_BT[row, len(expected_T) :].any()
    assert entropy_BT.requires_grad == (mode == "gradient")
    logp_BT.sum().backward(retain_graph=True)
    assert entropies.call_count == (5 if mode == "value" else 10)  # the backward needs only their gradient
    if mode == "gradient":
        (head,) = torch.autograd.grad(entropy_BT.sum(), learner.model.lm_head.weight)
        assert head.any()


def test_entropy_of_a_masked_vocabulary_is_that_of_the_rest() -> None:
    logits_RV = torch.randn(3, 6, generator=torch.Generator().manual_seed(0), requires_grad=True)
    allowed = torch.tensor([True, False, True, True, False, True])
    entropy_R = entropy_of(logits_RV.masked_fill(~allowed, -math.inf).log_softmax(1))
    (grad_RV,) = torch.autograd.grad(entropy_R.sum(), logits_RV)
    exact_RV = logits_RV.detach().double()[:, allowed].requires_grad_()
    expected_R = torch.distributions.Categorical(logits=exact_RV).entropy()
    (expected_RV,) = torch.autograd.grad(expected_R.sum(), exact_RV)
    torch.testing.assert_close(entropy_R.double(), expected_R, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grad_RV[:, allowed].double(), expected_RV, rtol=1e-5, atol=1e-6)
    assert not grad_RV[:, ~allowed].any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("numerics", ["stock", "portable"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_are_transformers(
    tiny_models: dict[str, Path], kind: str, numerics: Numerics, temperature: float
) -> None:
    with torch.no_grad():
        logp_BT = policy(tiny_models[kind], numerics, temperature=temperature)(batch()).logprobs_BT
    assert logp_BT.dtype == torch.float32
    assert logp_BT.shape == (6, 5)
    for row, expected in enumerate(response_log_probs(tiny_models[kind], temperature)):
        torch.testing.assert_close(logp_BT[row, : len(expected)].double(), expected, rtol=0, atol=1e-4)
        assert not logp_BT[row, len(expected) :].any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("numerics", ["portable", "engine"])
def test_gradients_are_transformers_where_responses_share_a_prompt(
    tiny_models: dict[str, Path], kind: str, numerics: Numerics
) -> None:
    """A shared prompt's gradient is the sum over its responses; transformers computes each alone, padded."""
    data = batch()
    assert [row.owns_prompt for row in data.rows] == [True, False] * 3
    weight_S = torch.linspace(-1, 1, int(data.mask_BT.sum()))

    def gradients(numerics: Numerics) -> dict[str, Tensor]:
        learner = policy(tiny_models[kind], numerics)
        (learner(data).logprobs_BT[data.mask_BT] * weight_S).sum().backward()
        return {name: parameter.grad for name, parameter in learner.named_parameters() if parameter.grad is not None}

    expected, found = gradients("stock"), gradients(numerics)
    assert found.keys() == expected.keys()
    for name, grad in found.items():
        size = expected[name].abs().max()
        assert size > 0, name
        assert (grad - expected[name]).abs().max() < 1e-4 * size, name


@pytest.mark.parametrize("scheme", [PLAIN, W8A8], ids=lambda scheme: scheme.name)
@pytest.mark.parametrize("numerics", ["stock", "portable"])
def test_gradient_reaches_every_parameter(
    tiny_models: dict[str, Path], numerics: Numerics, scheme: QuantScheme
) -> None:
    learner = policy(tiny_models["qwen2"], numerics, scheme)
    (learner(batch()).logprobs_BT * batch().mask_BT).sum().backward()
    for name, parameter in learner.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_gradient_ignores_what_is_masked(tiny_models: dict[str, Path]) -> None:
    learner = policy(tiny_models["qwen3"], "portable")
    data = batch()
    learner(data).logprobs_BT[~data.mask_BT].sum().backward()
    assert not any(p.grad is not None and p.grad.any() for p in learner.parameters())


def test_aligned_linears(tiny_models: dict[str, Path]) -> None:
    aligned = policy(tiny_models["qwen3"], "portable", W8A8)
    names = [name for name, _ in quantized_linears(aligned.model)]
    assert aligned.quantized_names == names
    assert len(names) == 3 * 7
    assert policy(tiny_models["qwen3"], "portable").quantized_names == []


def test_low_bits_shift_log_probs_a_little_until_weights_change(tiny_models: dict[str, Path]) -> None:
    aligned, plain = (policy(tiny_models["qwen3"], "portable", scheme) for scheme in (W8A8, PLAIN))
    data = batch()
    with torch.no_grad():
        before = aligned(data).logprobs_BT
        gap = (before - plain(data).logprobs_BT).abs()[data.mask_BT].mean()
        assert 1e-4 < gap < 0.3
        for _, linear in quantized_linears(aligned):
            linear.weight.mul_(0.5)
        assert torch.equal(aligned(data).logprobs_BT, before)
        requantize(aligned)
        assert not torch.equal(aligned(data).logprobs_BT, before)


@pytest.mark.parametrize("numerics", ["stock", "portable"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_frequencies_are_float32_in_any_dtype(
    tiny_models: dict[str, Path], numerics: Numerics, dtype: torch.dtype
) -> None:
    learner = policy(tiny_models["qwen3"], numerics, dtype=dtype)
    assert {p.dtype for p in learner.parameters()} == {dtype}
    frequencies = learner.model.model.rotary_emb.inv_freq
    expected = 10000.0 ** (-torch.arange(0, 32, 2, dtype=torch.float64) / 32)
    assert frequencies.dtype == torch.float32
    torch.testing.assert_close(frequencies.double(), expected, rtol=1e-6, atol=0)


def test_model_that_cannot_be_loaded(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=str(tmp_path)):
        policy(tmp_path, "portable")
    (tmp_path / "config.json").write_text('{"model_type": "no_such_model"}')
    with pytest.raises(ModelError, match="no_such_model"):
        policy(tmp_path, "portable")


def test_broken_weights_file(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    shutil.copy(tiny_models["qwen3"] / "config.json", tmp_path)
    weights = (tiny_models["qwen3"] / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ModelError, match=r"model\.safetensors: SafetensorError"):
        policy(tmp_path, "portable")


@pytest.mark.parametrize("numerics", ["engine", "portable", "stock"])
def test_a_head_in_chunks_gives_the_same_bits(
    tiny_models: dict[str, Path], numerics: Numerics, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    rows = [TrainSequence((1, 2), tuple(rng.integers(4, 256, n)), np.zeros(n, np.float32)) for n in (90, 60, 120)]
    learner, found = policy(tiny_models["llama"], numerics, W8A8, dtype=torch.bfloat16), []
    for elements in (2**24, 0):  # one chunk, and chunks of 64 tokens
        monkeypatch.setattr("trainer.policy.Policy.head_elements", elements)
        learner.zero_grad()
        output = learner(Batch.of(rows, CPU), "gradient")
        (output.logprobs_BT.sum() + output.entropy_BT.sum()).backward()
        grads = torch.cat([parameter.grad.float().flatten() for parameter in learner.parameters()])
        found.append((output, grads))
    (whole, whole_grads), (chunked, grads) = found
    assert torch.equal(chunked.logprobs_BT, whole.logprobs_BT)
    assert torch.equal(chunked.entropy_BT, whole.entropy_BT)
    assert (grads - whole_grads).norm() < 1e-3 * whole_grads.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scheme", [PLAIN, W8A8], ids=lambda scheme: scheme.name)
def test_no_log_prob_depends_on_the_number_of_threads(scheme: QuantScheme, dtype: torch.dtype, tmp_path: Path) -> None:
    """The engine samples on one thread, and a learner rank computes on several."""
    wide = {"hidden_size": 256, "intermediate_size": 768, "vocab_size": 8192}
    path = random_model("llama", tmp_path, num_attention_heads=4, **wide)
    rng = np.random.default_rng(0)
    prompts = [tuple(rng.integers(4, 8192, n)) for n in (30, 7)]
    rows = [
        TrainSequence(p, tuple(rng.integers(4, 8192, n)), np.zeros(n, np.float32)) for p in prompts for n in (90, 5)
    ]
    learner, before, found = policy(path, "engine", scheme, dtype=dtype), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            with torch.no_grad():
                found.append(learner(Batch.of(rows, CPU)).logprobs_BT)
    finally:
        torch.set_num_threads(before)
    assert found[0].abs().sum() > 0
    assert torch.equal(found[1], found[0])
    assert torch.equal(found[2], found[0])


SCALED = {
    "granite": {"logits_scaling": 8.0, "residual_multiplier": 0.7, "attention_multiplier": 0.2},
    "cohere": {"logit_scale": 0.1},
    "gemma2": {"final_logit_softcapping": 2.0, "head_dim": 32},
    "gpt_neox": {},
    "gpt2": {},
}
"""What these models do after the head, or under other names than Llama's."""


def random_model(kind: str, path: Path, **changes: Any) -> Path:
    shape: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 256}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 2}
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **special, initializer_range=0.2, **(shape | changes))
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return path


@pytest.mark.parametrize("kind", SCALED)
def test_what_a_model_does_after_its_head(kind: str, tmp_path: Path) -> None:
    path = random_model(kind, tmp_path, **SCALED[kind])
    with torch.no_grad():
        logp_BT = policy(path, "stock", temperature=0.7)(batch()).logprobs_BT
    for row, expected in enumerate(response_log_probs(path, 0.7)):
        torch.testing.assert_close(logp_BT[row, : len(expected)].double(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("numerics", "scheme", "dtype", "scale"),
    [
        ("engine", W8A8, torch.bfloat16, 2.0),
        ("portable", W8A8, torch.bfloat16, 2.0),
        ("stock", W8A8, torch.bfloat16, 1.1),
        ("stock", PLAIN, torch.float32, 1.01),
        ("portable", PLAIN, torch.float32, 1.01),
        ("engine", PLAIN, torch.float32, 1.01),
    ],
)
def test_a_forward_that_is_not_the_models_is_refused_by_name(
    tiny_models: dict[str, Path],
    numerics: Numerics,
    scheme: QuantScheme,
    dtype: torch.dtype,
    scale: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A scale that is wrong by a little, as far as rounding lets it show."""
    monkeypatch.setattr("trainer.policy.after_head", lambda logits, _: logits / scale)
    with pytest.raises(ModelError, match=f"numerics '{numerics}' do not compute what Qwen2ForCausalLM computes"):
        policy(tiny_models["qwen2"], numerics, scheme, dtype=dtype)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("qwen3", {"attention_dropout": 0.5, "head_dim": 32}),
        ("gpt2", {"attn_pdrop": 0.5, "embd_pdrop": 0.5, "resid_pdrop": 0.5}),
        ("gpt_neox", {"hidden_dropout": 0.5, "attention_dropout": 0.5}),
        ("mixtral", {"router_jitter_noise": 0.5, "num_local_experts": 2}),
    ],
)
def test_a_policy_in_training_draws_nothing(kind: str, changes: dict[str, Any], tmp_path: Path) -> None:
    learner = policy(random_model(kind, tmp_path, **changes), "stock")
    expected_BT = learner(batch()).logprobs_BT
    learner.train()
    learner.model.gradient_checkpointing_enable({"use_reentrant": False})
    assert torch.equal(learner(batch()).logprobs_BT, expected_BT)
    layers = [module for module in learner.modules() if isinstance(module, GradientCheckpointingLayer)]
    assert layers
    assert all(layer.training and layer.gradient_checkpointing for layer in layers)


LONG = """
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from qarl.quant.scheme import QuantScheme
from qarl.types import TrainSequence
from trainer.batching import Batch
from trainer.policy import Policy

width, tied = int(sys.argv[2]), sys.argv[3] == "tied"
heads = dict(num_attention_heads=width // 64, num_key_value_heads=1)
shape = dict(hidden_size=width, intermediate_size=32, num_hidden_layers=1, tie_word_embeddings=tied)
config = AutoConfig.for_model("llama", **shape, **heads, vocab_size=151936, max_position_embeddings=1024)
AutoModelForCausalLM.from_config(config).save_pretrained("model")
policy = Policy("model", torch.float32, QuantScheme("none"), "portable")
for parameter in policy.parameters():
    parameter.grad = torch.zeros_like(parameter)


def gib(key):
    status = Path("/proc/self/status").read_text()
    return int(status.partition(key + ":")[2].split()[0]) / 2**20


Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
before = gib("VmRSS")
rows = [TrainSequence((1, 2), tuple(range(512)), np.zeros(512, np.float32)) for _ in range(int(sys.argv[1]) // 512)]
policy(Batch.of(rows, torch.device("cpu"))).logprobs_BT.sum().backward()
print(gib("VmHWM") - before)
"""


@pytest.mark.parametrize(
    ("tokens", "width", "tied", "least", "most"),
    [
        (1024, 64, "apart", 0.1, 0.5),
        pytest.param(8192, 64, "apart", 0.1, 0.5, marks=pytest.mark.slow),
        pytest.param(512, 896, "apart", 0.5, 0.93, marks=pytest.mark.slow),
        pytest.param(512, 896, "tied", 1.0, 1.3, marks=pytest.mark.slow),
    ],
)
def test_the_memory_of_a_wide_vocabulary_does_not_grow_with_the_tokens(
    tokens: int, width: int, tied: str, least: float, most: float, tmp_path: Path
) -> None:
    """With 896 features (Qwen2.5-0.5B) the gradient of the head is 0.51 GiB: one such buffer, and a second one for the
    embedding's part where they are tied. 0.93 GiB are 1 GB. Activations of the layer, which do grow, are small here.

    All logits of 8,192 tokens at once would be 5 GB, and their log-probs and gradients as much each.
    """
    command = [sys.executable, "-c", LONG, str(tokens), str(width), tied]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert least < float(done.stdout.splitlines()[-1]) < most, done.stdout  # GiB beyond the model and its gradients

"""The learner's arithmetic against the real engine's: layer by layer, and end to end, bit for bit."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import vllm
from vllm.v1.core.sched.scheduler import Scheduler

from qarl.config.io import load_config
from qarl.config.policy import PROBE_PROMPTS, RolloutConfig
from qarl.errors import KernelError, PublicationError
from qarl.mismatch import Mismatch
from qarl.model_folder import read_tokenizer
from qarl.numerics import engine_ops, processor
from qarl.prompts.pool import Pool
from qarl.quant.int8 import quantize_weight, w8a8_forward
from qarl.quant.linear import switch_scheme
from qarl.quant.parity import check_parity
from qarl.quant.publish import checkpoint_tensors, publish, write_checkpoint, write_engine_config
from qarl.quant.scheme import QuantScheme
from qarl.types import Prompt, Sample, SampleRequest, TrainSequence
from qarl.weights.source import PublishedWeights
from qarl.weights.wire import pack, seal
from rollout.engine import VLLMEngine
from tests.support.fakes import FakeFleet, FakeLearner, FakeRewards, FakeTracker
from tests.support.hosts import EXACT_W8A8, engine_w8a8, needs_avx512
from tests.support.real_engine import SCHEME, conversing, gap, partial_samples, perturbed, requests, stock_vllm
from trainer.batching import Batch
from trainer.checkpoint import CheckpointStore
from trainer.loop import Trainer
from trainer.policy import Policy

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def policy(tiny_models: dict[str, Path]) -> Policy:
    return Policy(tiny_models["qwen3"], torch.bfloat16, SCHEME, "engine")


@pytest.fixture(scope="module")
def large_heads(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[VLLMEngine, Policy]:
    """Engine and learner with heads of 256. With 2 MiB of L2 cache their attention prefills otherwise than it decodes
    from some 600 tokens on; with heads of 32 it does nowhere up to 1,500. The KV cache holds 40 blocks of 128."""
    model, folder = tiny_models["qwen3_large_heads"], tmp_path_factory.mktemp("large_heads")
    write_engine_config(folder, model, SCHEME)
    with patch("vllm.LLM", partial(vllm.LLM, num_gpu_blocks_override=41)):
        engine = VLLMEngine(folder, RolloutConfig(max_model_len=1024), SCHEME, "bfloat16", "cpu")
    assert engine.info().at_once == 5
    policy = Policy(model, torch.bfloat16, SCHEME, "engine")
    engine.load(publish(policy.model, SCHEME, 0))
    return engine, policy


@pytest.fixture(scope="module")
def prefills_otherwise(large_heads: tuple[VLLMEngine, Policy]) -> bool:
    """Whether this processor's cache makes them differ at 850 tokens."""
    engine, _ = large_heads
    samples = engine.generate(
        [dataclasses.replace(request, ignore_eos=True) for request in requests(4, 60, before=800)]
    )
    return Mismatch.between(engine.score(samples), [sample.logprobs_T for sample in samples]).abs_max > 0.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tokens", [1, 3, 4, 5, 64, 300])
def test_w8a8_layer_equals_the_engines_layer_bitwise(tokens: int, bias: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(tokens)
    x = (torch.randn(tokens, 192) * torch.rand(tokens, 1) * 5).to(dtype)
    q_NK, scale_N1 = quantize_weight(torch.randn(320, 192).to(dtype))
    bias_N = torch.randn(320).to(dtype) if bias else None
    ours = engine_w8a8(x, q_NK, scale_N1, bias_N)
    theirs = engine_ops.w8a8_linear(x, engine_ops.W8A8Weight(q_NK, scale_N1, bias_N, dtype))
    assert torch.equal(ours, theirs)
    if not processor.has_vnni():  # what a run says of such a host at its start
        assert not torch.equal(w8a8_forward(x, q_NK, scale_N1, bias_N), theirs)


def test_every_op_of_this_host_equals_the_engines(policy: Policy) -> None:
    checks = check_parity(policy.model.config, torch.bfloat16, SCHEME, EXACT_W8A8)
    assert {check.op for check in checks} == {"w8a8_int8 linear", "head", "rope"}
    assert all(check.exact for check in checks), list(map(str, checks))


def test_engine_selected_the_int8_kernel(engine: VLLMEngine) -> None:
    assert engine.info().kernels == ("CPUInt8ScaledMMLinearKernel",)


def test_mismatch_is_exactly_zero_and_the_unaligned_learners_is_not(
    engine: VLLMEngine, policy: Policy, tiny_models: dict[str, Path]
) -> None:
    engine.load(publish(policy.model, SCHEME, 1))
    samples = engine.generate(requests(48, 100))
    assert {s.version for s in samples} == {1}
    assert gap(policy, samples).abs_max == 0.0
    plain = Policy(tiny_models["qwen3"], torch.bfloat16, QuantScheme("none"), "stock")
    assert gap(plain, samples).abs_mean > 1e-3


def test_mismatch_is_zero_where_attention_prefills_otherwise_than_it_decodes(
    large_heads: tuple[VLLMEngine, Policy], prefills_otherwise: bool
) -> None:
    """The learner follows both. Responses that begin before that length, and others that begin behind it."""
    engine, policy = large_heads
    engine.load(publish(policy.model, SCHEME, 1))
    asked = [*requests(3, 180, before=640), *requests(2, 60, seed=1, before=800)]
    samples = engine.generate([dataclasses.replace(request, ignore_eos=True) for request in asked])
    assert gap(policy, samples).abs_max == 0.0
    own = Mismatch.between(engine.score(samples), [sample.logprobs_T for sample in samples])
    assert own.abs_max > 0.0 or not prefills_otherwise


def test_responses_that_share_a_long_prompt_have_no_mismatch(
    large_heads: tuple[VLLMEngine, Policy], prefills_otherwise: bool
) -> None:
    """Those that took the prompt's beginning from the prefix cache would round its end differently."""
    engine, policy = large_heads
    engine.load(publish(policy.model, SCHEME, 1))
    asked = [dataclasses.replace(r, seed=seed) for r in requests(3, 20, before=720) for seed in range(3)]
    assert gap(policy, engine.generate(asked)).abs_max == 0.0


def test_a_full_kv_cache_changes_no_bit(
    large_heads: tuple[VLLMEngine, Policy], prefills_otherwise: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of seven responses five fit, and the others wait. If all began, vLLM would prefill decoded tokens again."""
    engine, policy = large_heads
    engine.load(publish(policy.model, SCHEME, 1))
    preempt, preempted = Scheduler._preempt_request, list[str]()

    def counted(self: Scheduler, request: Any, *args: Any, **kwargs: Any) -> None:
        preempted.append(request.request_id)
        preempt(self, request, *args, **kwargs)

    monkeypatch.setattr(Scheduler, "_preempt_request", counted)
    asked = [dataclasses.replace(request, ignore_eos=True) for request in requests(7, 130, before=640)]
    samples = engine.generate(asked)
    assert not preempted
    assert gap(policy, samples).abs_max == 0.0
    monkeypatch.setattr(engine, "_blocks", 1000)
    without = gap(policy, engine.generate(asked)).abs_max
    assert preempted
    assert without > 0.0 or not prefills_otherwise


@pytest.mark.parametrize(("turns", "tokens", "given", "before"), [(2, 50, 13, 0), (3, 40, 1, 0), (3, 60, 20, 640)])
def test_mismatch_is_zero_over_the_turns_of_a_conversation(
    large_heads: tuple[VLLMEngine, Policy], prefills_otherwise: bool, turns: int, tokens: int, given: int, before: int
) -> None:
    """Later turns prefill what earlier ones decoded, on both sides; in the last case the two differ."""
    engine, policy = large_heads
    engine.load(publish(policy.model, SCHEME, 1))
    asked = requests(3, tokens, before=before)
    samples = conversing(engine, turns, given).sample([*asked, *(dataclasses.replace(r, seed=9) for r in asked)])
    assert [len(TrainSequence.of(sample).turns) for sample in samples] == [turns] * 6
    assert gap(policy, samples).abs_max == 0.0
    if prefills_otherwise or not before:
        assert (gap(policy, samples, as_one=True).abs_max > 0.0) == (before > 0)


def test_weights_that_come_between_two_turns_leave_every_turn_exact(large_heads: tuple[VLLMEngine, Policy]) -> None:
    engine, policy = large_heads
    policies = {version: perturbed(policy, seed=version) for version in (1, 2)}
    talks = conversing(engine, turns=3, given=7)
    engine.load(publish(policies[1].model, SCHEME, 1))
    talks.submit([requests(3, 40, before=700)])
    engine.load(publish(policies[2].model, SCHEME, 2))
    assert talks.poll(0.0) == talks.poll(0.0) == {}
    (samples,) = talks.poll(0.0).values()
    assert [sample.versions for sample in samples] == [[1, 2]] * 3
    assert [len(TrainSequence.of(sample).turns) for sample in samples] == [3] * 3
    assert [gap(own, samples, version).abs_max for version, own in policies.items()] == [0.0, 0.0]
    assert gap(policies[2], samples, 1).abs_max > 0.0


@pytest.mark.parametrize(("tokens", "steps", "before"), [(60, 20, 0), (220, 90, 640)])
def test_a_partial_response_is_exact_in_every_version_that_sampled_it(
    large_heads: tuple[VLLMEngine, Policy], prefills_otherwise: bool, tokens: int, steps: int, before: int
) -> None:
    """Weights come twice while responses run; in the last case where attention prefills otherwise than it decodes."""
    engine, policy = large_heads
    policies = {version: perturbed(policy, seed=version) for version in (1, 2, 3)}
    weights = [publish(changed.model, SCHEME, version) for version, changed in policies.items()]
    asked = [dataclasses.replace(request, ignore_eos=True) for request in requests(3, tokens, before=before)]
    asked += [dataclasses.replace(asked[0], seed=9), dataclasses.replace(asked[0], max_new_tokens=steps + 1)]
    samples = partial_samples(engine, weights, asked, steps)
    turns = [(0, steps), (steps, 2 * steps), (2 * steps, tokens)]
    assert [TrainSequence.of(sample).turns for sample in samples] == [turns] * 4 + [[(0, steps), (steps, steps + 1)]]
    assert [sample.versions for sample in samples] == [[1, 2, 3]] * 4 + [[1, 2]]
    assert {sample.finish_reason for sample in samples} == {"length"}
    assert [gap(own, samples, version).abs_max for version, own in policies.items()] == [0.0] * 3
    if prefills_otherwise or not before:
        assert (gap(policies[3], samples, 3, as_one=True).abs_max > 0.0) == (before > 0)
    assert gap(policies[3], samples, 2).abs_max > 0.0
    again = samples if before else partial_samples(engine, weights, asked, steps)
    assert [sample.response_ids for sample in again] == [sample.response_ids for sample in samples]
    assert all(np.array_equal(a.logprobs_T, b.logprobs_T) for a, b in zip(again, samples, strict=True))


@pytest.mark.parametrize("keep_kv", [False, True])
def test_a_response_that_keeps_its_keys_needs_no_prefill_and_is_inexact(
    policy: Policy, tiny_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep_kv: bool
) -> None:
    """With new weights; what is asked then is exact, also where its prompt was prefilled under the old ones."""
    write_engine_config(tmp_path, tiny_models["qwen3"], SCHEME)
    config = RolloutConfig(max_model_len=256, partial=True, keep_kv=keep_kv)
    engine = VLLMEngine(tmp_path, config, SCHEME, "bfloat16", "cpu")
    policies = {version: perturbed(policy, seed=version) for version in (1, 2)}
    scheduled, schedule = list[int](), Scheduler.schedule

    def counted(self: Scheduler, *args: Any, **kwargs: Any) -> Any:
        output = schedule(self, *args, **kwargs)
        scheduled.append(output.total_num_scheduled_tokens)
        return output

    monkeypatch.setattr(Scheduler, "schedule", counted)
    asked = [dataclasses.replace(request, ignore_eos=True) for request in requests(4, 60, before=150)]
    engine.load(publish(policies[1].model, SCHEME, 1))
    engine.generate(asked)  # where there is a prefix cache, it has their prompts
    engine.add({10 + n: dataclasses.replace(request, partial=True) for n, request in enumerate(asked)})
    for _ in range(20):
        assert not engine.step()
    engine.load(publish(policies[2].model, SCHEME, 2))
    before = len(scheduled)
    engine.step()
    so_far = sum(len(request.prompt.token_ids) + 20 for request in asked)
    assert scheduled[before] == (len(asked) if keep_kv else so_far)
    engine.add(dict(enumerate(asked)))
    samples: dict[int, Sample] = {}
    while len(samples) < 2 * len(asked):
        samples |= engine.step()
    new, interrupted = ([samples[first + n] for n in range(len(asked))] for first in (0, 10))
    assert gap(policies[2], new).abs_max == 0.0
    assert [TrainSequence.of(sample).turns for sample in interrupted] == [[(0, 20), (20, 60)]] * 4
    assert [sample.versions for sample in interrupted] == [[1, 2]] * 4
    assert gap(policies[1], interrupted, 1).abs_max == 0.0
    assert (gap(policies[2], interrupted, 2).abs_max > 0.0) == keep_kv


def test_partial_responses_leave_the_probe_its_places(engine: VLLMEngine, policy: Policy) -> None:
    """It begins in the first step after a publication, beside more requests than the engine runs at once."""
    engine.load(publish(policy.model, SCHEME, 1))
    asked = [dataclasses.replace(request, ignore_eos=True, partial=True) for request in requests(100, 99)]
    engine.add(dict(enumerate(asked)))
    engine.step()
    engine.load(publish(policy.model, SCHEME, 2))
    probe = dict(enumerate(requests(PROBE_PROMPTS, 2), 9000))
    engine.add(probe)
    samples = engine.step() | engine.step()
    engine.abort(range(2000))
    assert samples.keys() == probe.keys()
    assert gap(policy, list(samples.values())).abs_max == 0.0


def test_more_prompt_tokens_than_one_engine_step_holds(engine: VLLMEngine, policy: Policy) -> None:
    """Chunks of a prompt would break a seeded request in vLLM's CPU sampler: 64 x 100 tokens, 4,096 a step."""
    engine.load(publish(policy.model, SCHEME, 1))
    rng = np.random.default_rng(2)
    prompts = [Prompt(str(i), "", "", tuple(int(t) for t in rng.integers(4, 256, 100))) for i in range(64)]
    samples = engine.generate([SampleRequest(prompt, i, 1.0, 8) for i, prompt in enumerate(prompts)])
    assert gap(policy, samples).abs_max == 0.0


def test_equal_seeds_give_equal_samples_in_any_batch(engine: VLLMEngine, policy: Policy) -> None:
    engine.load(publish(policy.model, SCHEME, 1))
    asked = requests(12, 40)
    together = engine.generate(asked)
    alone = [engine.generate([request])[0] for request in asked[:3]]
    for one, other in zip(alone, together, strict=False):
        assert one.response_ids == other.response_ids
        assert np.array_equal(one.logprobs_T, other.logprobs_T)


def test_requests_that_come_at_any_time_give_the_same_samples(engine: VLLMEngine, policy: Policy) -> None:
    """Groups are added between steps while others run, and one is aborted."""
    engine.load(publish(policy.model, SCHEME, 1))
    asked = [dataclasses.replace(request, seed=seed) for request in requests(6, 40) for seed in range(4)]
    together = engine.generate(asked)
    samples: dict[int, Sample] = {}
    for first in (20, 4, 8, 0, 16, 12):
        engine.add({number: asked[number] for number in range(first, first + 4)})
        for _ in range(first % 7):
            samples |= engine.step()
        if first == 16:
            engine.abort([16, 17, 18, 19])
    while len(samples) < 20:
        samples |= engine.step()
    assert sorted(samples) == [*range(16), *range(20, 24)]
    for number, sample in samples.items():
        assert sample.response_ids == together[number].response_ids
        assert np.array_equal(sample.logprobs_T, together[number].logprobs_T)
    engine.load(publish(policy.model, SCHEME, 2))  # nothing runs any more


def test_stop_strings_and_ids_end_a_response_and_change_nothing_before(
    engine: VLLMEngine, policy: Policy, tiny_models: dict[str, Path]
) -> None:
    """A stop string may begin in one token and end within the next: both were sampled, and both count."""
    engine.load(publish(policy.model, SCHEME, 1))
    asked = [dataclasses.replace(request, ignore_eos=True) for request in requests(6, 60)]
    free = engine.generate(asked)
    tokenizer = read_tokenizer(tiny_models["qwen3"])
    stopping, lengths, texts = [], [], []
    for number, (request, sample) in enumerate(zip(asked, free, strict=True)):
        parts = [tokenizer.decode(sample.response_ids[:n], skip_special_tokens=True) for n in range(61)]
        if number % 2:
            stop_id = sample.response_ids[20]
            lengths.append(sample.response_ids.index(stop_id) + 1)
            stopping.append(dataclasses.replace(request, stop_token_ids=(stop_id,)))
            texts.append(parts[lengths[-1] - 1])
        else:
            across = len(parts[20])
            stop = parts[22][across - 2 : across + 2]
            lengths.append(next(n for n, part in enumerate(parts) if stop in part))
            stopping.append(dataclasses.replace(request, stop=(stop,)))
            texts.append(sample.text.partition(stop)[0])
    samples = engine.generate(stopping)
    assert [len(sample.response_ids) for sample in samples] == lengths
    assert min(lengths) > 1
    assert [sample.text for sample in samples] == texts
    assert {sample.finish_reason for sample in samples} == {"stop"}
    for sample, whole in zip(samples, free, strict=True):
        n = len(sample.response_ids)
        assert sample.response_ids == whole.response_ids[:n]
        assert np.array_equal(sample.logprobs_T, whole.logprobs_T[:n])
    assert gap(policy, samples).abs_max == 0.0
    # Equal weights that come in between change nothing: stops, lengths and random numbers are those of whole responses.
    weights = [publish(policy.model, SCHEME, version) for version in (1, 2, 3)]
    again = partial_samples(engine, weights, [*stopping, *asked], steps=20)
    for one, other in zip(again, [*samples, *free], strict=True):
        assert one.versions == [1, 2, 3][: -(-len(one.response_ids) // 20)]
        assert (one.response_ids, one.text, one.finish_reason) == (other.response_ids, other.text, other.finish_reason)
        assert np.array_equal(one.logprobs_T, other.logprobs_T)


def test_reloaded_engine_equals_a_freshly_started_one(engine: VLLMEngine, policy: Policy, tmp_path: Path) -> None:
    """In-place reload against stock `vllm.LLM(path)` on the exported checkpoint, in a process of its own."""
    changed = perturbed(policy)
    engine.load(publish(policy.model, SCHEME, 1))
    engine.load(publish(changed.model, SCHEME, 2))
    samples = engine.generate(requests(16, 60))
    source = Path(policy.model.config._name_or_path)
    write_checkpoint(checkpoint_tensors(changed.model), tmp_path / "fresh", source, SCHEME)
    asked = [(list(s.prompt.token_ids), i) for i, s in enumerate(samples)]
    fresh = stock_vllm(tmp_path / "fresh", asked, tokens=60)
    assert [tokens for tokens, _ in fresh] == [list(s.response_ids) for s in samples]
    for (_, logprobs), sample in zip(fresh, samples, strict=True):
        assert np.array_equal(np.float32(logprobs), sample.logprobs_T)
    assert gap(changed, samples).abs_max == 0.0
    assert gap(policy, samples).abs_max > 0.0  # the engine does hold the new weights


def test_a_corrupted_scale_is_refused_and_the_old_weights_stay(engine: VLLMEngine, policy: Policy) -> None:
    engine.load(publish(policy.model, SCHEME, 1))
    bad = corrupt_scale(publish(perturbed(policy).model, SCHEME, 2), fix_digests=False)
    with pytest.raises(PublicationError, match="weight_scale differs from its digest"):
        engine.load(bad)
    assert engine.version == 1
    assert gap(policy, engine.generate(requests(4, 20))).abs_max == 0.0


def test_a_scale_corrupted_before_its_digest_shows_in_the_probe(engine: VLLMEngine, policy: Policy) -> None:
    engine.load(corrupt_scale(publish(policy.model, SCHEME, 1), fix_digests=True))
    assert gap(policy, engine.generate(requests(4, 16))).abs_max > 0.0


@pytest.mark.parametrize(
    ("fix_digests", "reason"),
    [(False, "weight_scale differs from its digest"), (True, "does not compute what was published")],
)
def test_a_corrupted_scale_stops_the_run(
    engine: VLLMEngine, policy: Policy, tmp_path: Path, fix_digests: bool, reason: str
) -> None:
    """The training loop over the real engine and the real policy; the second publication has one wrong scale."""

    class Learner(FakeLearner):
        def score(
            self, sequences: Sequence[TrainSequence], aligned: bool = True, version: int | None = None
        ) -> list[np.ndarray]:
            with torch.no_grad():
                logp_BT = policy(Batch.of(sequences, torch.device("cpu"))).logprobs_BT
            return [logp_BT[row, : len(s.response_ids)].numpy() for row, s in enumerate(sequences)]

        def publish(self, version: int) -> PublishedWeights:
            weights = publish(policy.model, SCHEME, version)
            return corrupt_scale(weights, fix_digests) if version == 1 else weights

    class Fleet(FakeFleet):
        def sample(self, requests: Sequence[SampleRequest]) -> list[Sample]:
            return engine.generate(requests)

    fleet = Fleet([engine])  # type: ignore[list-item]
    prompts = [request.prompt for request in requests(8, 1)]
    small = {"prompts_per_step": 4, "group_size": 2, "steps": 3}
    config = load_config(ROOT / "configs" / "quickstart.yaml", [f"train.{k}={v}" for k, v in small.items()])
    pool = Pool(prompts, config.pool, 0)
    store = CheckpointStore(tmp_path, 1)
    trainer = Trainer(config, Learner(), fleet, FakeRewards(), pool, FakeTracker(), prompts[:4], store, exact=True)
    with pytest.raises(PublicationError, match=reason):
        trainer.run()
    assert trainer.progress.step == 0


def test_a_scheme_the_engine_does_not_run_is_an_error(tiny_models: dict[str, Path], engine: VLLMEngine) -> None:
    """A folder without quantization_config loads as bf16: the engine would run, unquantized."""
    with pytest.raises(KernelError, match="no low-bit kernel"):
        VLLMEngine(tiny_models["qwen3"], RolloutConfig(max_model_len=64), SCHEME, "bfloat16", "cpu")


@pytest.mark.parametrize(
    ("kind", "scheme", "group", "dtype"),
    [
        *((kind, "none", 128, "bfloat16") for kind in ("qwen3", "qwen2", "smollm2")),
        *((kind, "w8a8_int8", 128, "bfloat16") for kind in ("qwen2", "smollm2")),  # Qwen3: the tests above
        *(
            pytest.param(kind, "w4a16", group, "bfloat16", marks=needs_avx512)
            for kind in ("qwen3", "qwen2", "llama")
            for group in (32, 128)
        ),
        *((kind, scheme, 128, "float32") for kind in ("qwen3", "smollm2") for scheme in ("none", "w8a8_int8")),
        ("qwen2", "w4a8", 128, "bfloat16"),
        ("qwen3", "w4a8", 32, "float32"),
        ("qwen3", "fp8_channel", 128, "float32"),  # in bfloat16: test_float_formats.py
    ],
)
def test_other_architectures_and_formats_are_exact(
    kind: str, scheme: str, group: int, dtype: str, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    """Groups of responses, whose prompt the learner computes once; one prompt is longer than a block of the engine's
    prefix cache."""
    form = QuantScheme.of(scheme, ("lm_head",), group)  # type: ignore[arg-type]
    write_engine_config(tmp_path, tiny_models[kind], form)
    other = VLLMEngine(tmp_path, RolloutConfig(max_model_len=256), form, dtype, "cpu")
    policy = Policy(tiny_models[kind], getattr(torch, dtype), form, "engine")
    other.load(publish(policy.model, form, 0))
    different, size = [*requests(5, 80), *requests(1, 60, seed=1, before=130)], 4
    if scheme == "w4a8":  # torch's kernel is slow on x86
        different, size = requests(2, 24), 2
    few = [dataclasses.replace(request, seed=seed) for request in different for seed in range(size)]
    assert gap(policy, [*other.generate(few), *other.generate(few[:1])]).abs_max == 0.0
    assert gap(policy, conversing(other, turns=3, given=5).sample(requests(3, 24))).abs_max == 0.0
    again = perturbed(policy, form)
    other.load(publish(again.model, form, 1))
    assert gap(again, other.generate(few)).abs_max == 0.0
    partial = partial_samples(other, [publish(p.model, form, v) for v, p in enumerate((policy, again))], few[:4], 9)
    assert gap(policy, partial, 0).abs_max == gap(again, partial, 1).abs_max == 0.0


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["none", "w4a8", pytest.param("w4a16", marks=needs_avx512)])
def test_reloaded_equals_fresh_in_every_other_format(scheme: str, tiny_models: dict[str, Path], tmp_path: Path) -> None:
    form = QuantScheme.of(scheme, ("lm_head",), 32)  # type: ignore[arg-type]
    write_engine_config(tmp_path / "engine", tiny_models["qwen3"], form)
    other = VLLMEngine(tmp_path / "engine", RolloutConfig(max_model_len=256), form, "bfloat16", "cpu")
    policy = Policy(tiny_models["qwen3"], torch.bfloat16, form, "engine")
    changed = perturbed(policy, form)
    other.load(publish(policy.model, form, 1))
    other.load(publish(changed.model, form, 2))
    samples = other.generate(requests(4, 24))
    write_checkpoint(checkpoint_tensors(changed.model), tmp_path / "fresh", tiny_models["qwen3"], form)
    fresh = stock_vllm(tmp_path / "fresh", [(list(s.prompt.token_ids), i) for i, s in enumerate(samples)], tokens=24)
    assert [tokens for tokens, _ in fresh] == [list(s.response_ids) for s in samples]
    assert all(np.array_equal(np.float32(b), s.logprobs_T) for (_, b), s in zip(fresh, samples, strict=True))


def test_a_learner_that_changed_its_scheme_is_exact_in_the_new_one(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    later = QuantScheme("w4a16", group_size=64) if processor.has_avx512() else QuantScheme("fp8_channel")
    write_engine_config(tmp_path, tiny_models["qwen3"], later)
    other = VLLMEngine(tmp_path, RolloutConfig(max_model_len=256), later, "bfloat16", "cpu")
    changing = Policy(tiny_models["qwen3"], torch.bfloat16, SCHEME, "engine")
    before = publish(changing.model, SCHEME, 0)
    switch_scheme(changing.model, later)
    other.load(publish(changing.model, later, 0))
    assert gap(changing, other.generate(requests(8, 40))).abs_max == 0.0
    switch_scheme(changing.model, SCHEME)
    assert publish(changing.model, SCHEME, 0).manifest == before.manifest


def corrupt_scale(weights: PublishedWeights, fix_digests: bool) -> PublishedWeights:
    tensors = list(weights.tensors)
    index = next(i for i, t in enumerate(tensors) if t.name.endswith("layers.1.mlp.down_proj.weight_scale"))
    data = tensors[index].data.copy()
    data[3] *= 1.5
    tensors[index] = dataclasses.replace(tensors[index], data=data)
    if not fix_digests:
        return dataclasses.replace(weights, tensors=tuple(tensors))
    tensors[index] = pack(tensors[index].name, torch.from_numpy(data))
    return seal(weights.manifest.version, weights.manifest.scheme, tensors)


def test_an_op_that_differs_is_named(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    real = engine_ops.rotary_embedding

    def other_rounding(positions: torch.Tensor, q: torch.Tensor, *args: torch.Tensor) -> None:
        real(positions, q, *args)  # type: ignore[arg-type]
        q[0, 0] += 1.0

    monkeypatch.setattr(engine_ops, "rotary_embedding", other_rounding)
    differing = [
        check for check in check_parity(policy.model.config, torch.bfloat16, SCHEME, EXACT_W8A8) if not check.exact
    ]
    assert [str(check) for check in differing] == ["rope differs in 1 of 16384 outputs"]

"""`qarl mismatch`: where the gap between a learner and the engine comes from, switching one thing at a time.

The engine samples once for each scheme, dtype and length; everything else scores the same tokens. A process holds one
engine, so each scheme and dtype has a process of its own.
"""

import os
import random
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal, get_args

import numpy as np
import torch
from transformers.utils import logging as transformers_logging

from launch.demo.tiny_model import make_parent
from launch.run.gaps import GAPS_FILE, Cell, Gap
from launch.tools.child import own_process
from launch.tools.mismatch.report import write_report
from qarl.config.policy import RolloutConfig
from qarl.errors import ConfigError, DataError, KernelError, RolloutError
from qarl.mismatch import Logprobs
from qarl.model_folder import check_folder, read_tokenizer
from qarl.numerics.engine_limits import longest_context
from qarl.numerics.revert import RULES, revert_rule
from qarl.quant.linear import requantize
from qarl.quant.publish import publish, write_engine_config
from qarl.quant.reference import use_reference
from qarl.quant.scheme import KernelKind, QuantScheme
from qarl.seeds import derive_seed
from qarl.types import Numerics, Prompt, Sample, SampleRequest, TrainSequence
from rollout.engine import VLLMEngine, engine_env
from trainer.batching import Batch
from trainer.policy import Policy

Profile = Literal["unaligned", "stock", "portable", "engine"]
PROFILES: tuple[Profile, ...] = get_args(Profile)
LENGTHS = (256, 1500)
"""Tokens of the responses, unless other lengths are requested or these do not fit."""
ALONE = 2
"""Requests that are sampled again one by one."""
FORWARD_TOKENS = 4096
FORWARD_LOGITS = 2**26
"""Tokens and logits of one forward at most; one sequence always."""


@dataclass(frozen=True)
class Comparison:
    """What to measure. `prompts` is a text file of one prompt a line; without one, `heldout` are the prompts, or random
    tokens.

    `lr` is the learning rate of the optimizer step whose staleness is measured, unless `stale_model` names a model
    folder that takes its place. `steps` are those that a run has trained the model.
    """

    model: str
    schemes: Sequence[QuantScheme] = (QuantScheme(),)
    dtypes: Sequence[str] = ("bfloat16",)
    lengths: Sequence[int] = ()
    profiles: Sequence[Profile] = PROFILES
    num_sequences: int = 64
    prompt_tokens: int = 16
    prompts: Path | None = None
    heldout: Sequence[Prompt] = ()
    lr: float = 1e-6
    stale_model: str | None = None
    steps: int = 0
    kv_cache_gib: int = 2
    seed: int = 0


def run(comparison: Comparison, out: Path) -> list[Cell]:
    """Measure every scheme and dtype; the report in `out` grows with each. One without a kernel here is left out.

    Raises:
        UsageError: the model, the prompts, a length or `out` cannot be used.
        ConfigError, KernelError: nothing requested has a kernel here.
    """
    longest = longest_context(check_folder(Path(comparison.model)).config)
    if comparison.stale_model is not None:
        check_folder(Path(comparison.stale_model))
    prompts = make_prompts(comparison)
    if not comparison.lengths:
        room = longest - max(len(prompt.token_ids) for prompt in prompts) - 1
        fitting = [length for length in LENGTHS if length <= room]
        comparison = replace(comparison, lengths=fitting or [max(1, int(room))])
    config = _engine_config(comparison, prompts)
    if config.max_model_len > longest:
        what = f"responses of {max(comparison.lengths)} tokens do not fit in the model's {longest:g}"
        raise ConfigError(what, "--lengths", "lower them")
    make_parent(out / GAPS_FILE)  # now, and not after the measurement
    os.environ.update(engine_env("cpu", config))
    os.environ |= {"VLLM_LOGGING_LEVEL": "ERROR", "PYTHONWARNINGS": "ignore"}
    cells: list[Cell] = []
    reason: ConfigError | KernelError
    for scheme, dtype in product(comparison.schemes, comparison.dtypes):
        name = f"{scheme.label} {dtype}"
        lengths = " and ".join(map(str, comparison.lengths))
        print(f"{name}: {comparison.num_sequences} responses of {lengths} tokens", flush=True)
        try:
            cells += _in_own_process(comparison, scheme, dtype, prompts)
        except (ConfigError, KernelError) as error:  # no kernel on this device, or on this processor
            print(f"{name}: left out: {error}", flush=True)
            reason = error
        except BrokenProcessPool as error:
            raise RolloutError(f"{name}: {error}", hint="fewer --num-sequences take less memory") from error
        else:
            write_report(out, cells)
    if not cells:
        raise reason
    return cells


def _in_own_process(comparison: Comparison, scheme: QuantScheme, dtype: str, prompts: Sequence[Prompt]) -> list[Cell]:
    with own_process() as call:
        return list(call(measure, comparison, scheme, dtype, prompts))


def measure(comparison: Comparison, scheme: QuantScheme, dtype: str, prompts: Sequence[Prompt]) -> list[Cell]:
    """One cell for each length; starts an engine in this process."""
    transformers_logging.disable_progress_bar()
    policy = Policy(comparison.model, getattr(torch, dtype), scheme, "engine")
    with TemporaryDirectory() as folder:
        write_engine_config(Path(folder), Path(comparison.model), scheme)
        engine = VLLMEngine(Path(folder), _engine_config(comparison, prompts), scheme, dtype, "cpu")
        engine.load(publish(policy.model, scheme, 0))
        return [measure_length(engine, policy, comparison, scheme, prompts, length) for length in comparison.lengths]


def measure_length(
    engine: VLLMEngine,
    policy: Policy,
    comparison: Comparison,
    scheme: QuantScheme,
    prompts: Sequence[Prompt],
    length: int,
) -> Cell:
    """All gaps of responses of `length` tokens. `policy` is the exact learner, whose weights the engine holds."""
    requests = [
        SampleRequest(prompt, derive_seed(comparison.seed, "mismatch", index), 1.0, length, ignore_eos=True)
        for index, prompt in enumerate(prompts)
    ]
    samples = engine.generate(requests)
    sampler = [sample.logprobs_T for sample in samples]
    dtype = policy.model.dtype
    learners = Learners(comparison.model, dtype, scheme, samples)
    exact = score(policy, learners.sequences)
    gaps = [
        *profile_gaps(learners, comparison.profiles, exact, sampler),
        *engine_gaps(engine, requests, samples),
        *format_gaps(learners, exact),
        *rounding_gaps(learners, exact),
        staleness_gap(learners, comparison, sampler),
    ]
    mean_logprob = float(np.concatenate(sampler).mean(dtype=np.float64))
    kernels = list(engine.info().kernels)
    name = str(dtype).removeprefix("torch.")
    told = (comparison.model, scheme.label, name, kernels, length, len(samples), mean_logprob)
    return Cell(*told, gaps, comparison.steps)


class Learners:
    """Makes variants of the exact learner, and scores one set of samples with them."""

    def __init__(self, path: str, dtype: torch.dtype, scheme: QuantScheme, samples: Sequence[Sample]) -> None:
        self._path, self._dtype, self.scheme = path, dtype, scheme
        self.sequences = [TrainSequence(s.prompt.token_ids, s.response_ids, s.logprobs_T) for s in samples]

    def make(
        self,
        numerics: Numerics = "engine",
        scheme: QuantScheme | None = None,
        kernel: KernelKind = "auto",
        path: str | None = None,
    ) -> Policy:
        """The exact learner, with these arguments changed."""
        return Policy(path or self._path, self._dtype, scheme or self.scheme, numerics, kernel=kernel)

    def score(self, policy: Policy) -> list[Logprobs]:
        return score(policy, self.sequences)


def profile_gaps(
    learners: Learners, profiles: Sequence[Profile], exact: list[Logprobs], sampler: list[Logprobs]
) -> Iterator[Gap]:
    """Each learner against the sampler. Without quantization, `unaligned` is `stock` and left out."""
    for profile in profiles:
        match profile:
            case "engine":
                ours = exact
            case "portable":
                ours = learners.score(learners.make("portable", kernel="torch"))
            case "stock":
                ours = learners.score(learners.make("stock"))
            case "unaligned":
                if not learners.scheme.quantizes:
                    continue
                ours = learners.score(learners.make("stock", QuantScheme("none")))
        yield Gap.between("learner", profile, ours, sampler)


def engine_gaps(engine: VLLMEngine, requests: Sequence[SampleRequest], samples: Sequence[Sample]) -> Iterator[Gap]:
    """The engine against itself: prefill against decode, and decode in a batch of one against the whole batch."""
    yield Gap.between("engine", "prefill", engine.score(samples), [sample.logprobs_T for sample in samples])
    alone = [engine.generate([request])[0] for request in requests[:ALONE]]
    pairs = [(a.logprobs_T, b.logprobs_T, _common(a, b)) for a, b in zip(alone, samples, strict=False)]
    yield Gap.between("engine", "batch of one", [a[:n] for a, _, n in pairs], [b[:n] for _, b, n in pairs])


def format_gaps(learners: Learners, exact: list[Logprobs]) -> Iterator[Gap]:
    """From the plain model to the engine's layer: each step against the one before, all else as in the engine."""
    if not learners.scheme.quantizes:
        return

    def reference(weight_grid: bool, activation_grid: bool) -> list[Logprobs]:
        policy = learners.make()
        use_reference(policy.model, learners.scheme, weight_grid, activation_grid)
        return learners.score(policy)

    plain, weights, both = reference(False, False), reference(True, False), reference(True, True)
    yield Gap.between("format", "weight grid", weights, plain)
    yield Gap.between("format", "activation rounding", both, weights)
    yield Gap.between("format", "kernel", exact, both)


def rounding_gaps(learners: Learners, exact: list[Logprobs]) -> Iterator[Gap]:
    """The exact learner with one rule as in torch or transformers, against the exact learner."""
    if learners.scheme.quantizes:
        yield Gap.between("rounding", "linear", learners.score(learners.make(kernel="torch")), exact)
    for rule in RULES:
        policy = learners.make()
        revert_rule(policy.model, rule)
        yield Gap.between("rounding", rule, learners.score(policy), exact)


def staleness_gap(learners: Learners, comparison: Comparison, sampler: list[Logprobs]) -> Gap:
    """The exact learner after one optimizer step, or with another model, against the earlier sampler."""
    policy = learners.make(path=comparison.stale_model)
    if comparison.stale_model is None:
        one_step(policy, learners.sequences, comparison.lr)
    name = f"one step, lr {comparison.lr:g}" if comparison.stale_model is None else Path(comparison.stale_model).name
    return Gap.between("staleness", name, learners.score(policy), sampler)


def one_step(policy: Policy, sequences: Sequence[TrainSequence], lr: float) -> None:
    """One AdamW step on float32 masters: policy gradient, with advantages 1 and -1 in turn."""
    num_tokens = sum(len(sequence.response_ids) for sequence in sequences)
    for rows in _chunks(policy, sequences):
        batch = Batch.of([sequences[i] for i in rows], policy.device)
        advantage_B = torch.tensor([1.0 if i % 2 == 0 else -1.0 for i in rows])
        (-(policy(batch).logprobs_BT * advantage_B[:, None]).sum() / num_tokens).backward()
    parameters = list(policy.parameters())
    masters = [parameter.detach().float() for parameter in parameters]
    for master, parameter in zip(masters, parameters, strict=True):
        assert parameter.grad is not None
        master.grad = parameter.grad.float()
    torch.optim.AdamW(masters, lr=lr, weight_decay=0.0).step()
    with torch.no_grad():
        for master, parameter in zip(masters, parameters, strict=True):
            parameter.copy_(master)
    requantize(policy)


@torch.no_grad()
def score(policy: Policy, sequences: Sequence[TrainSequence]) -> list[Logprobs]:
    """Log-probs of each response."""
    found: list[Logprobs] = []
    for rows in _chunks(policy, sequences):
        logp_BT = policy(Batch.of([sequences[i] for i in rows], policy.device)).logprobs_BT
        found += [logp_T[: len(sequences[i].response_ids)].numpy() for i, logp_T in zip(rows, logp_BT, strict=True)]
    return found


def make_prompts(comparison: Comparison) -> list[Prompt]:
    """Prompts of the file's lines or of the held-out ones, in turn, or of random tokens without `<...>` markers.

    Raises DataError: the file cannot be read, or has no line.
    """
    tokenizer = read_tokenizer(Path(comparison.model))
    rows: list[Sequence[int]]
    if comparison.heldout and comparison.prompts is None:
        rows = [comparison.heldout[i % len(comparison.heldout)].token_ids for i in range(comparison.num_sequences)]
    elif comparison.prompts is None:
        rng = random.Random(derive_seed(comparison.seed, "prompts"))
        special = set(tokenizer.all_special_ids)
        plain = [
            id
            for token, id in sorted(tokenizer.get_vocab().items())
            if id not in special and not (token.startswith("<") and token.endswith(">"))
        ]
        rows = [rng.choices(plain, k=comparison.prompt_tokens) for _ in range(comparison.num_sequences)]
    else:
        try:
            lines = [line for line in comparison.prompts.read_text(encoding="utf-8").splitlines() if line]
        except OSError as error:
            raise DataError(f"cannot read: {error.strerror}", where=str(comparison.prompts)) from error
        except UnicodeDecodeError as error:
            raise DataError(f"not UTF-8 text ({error.reason})", str(comparison.prompts), "save it as UTF-8") from error
        if not lines:
            raise DataError("the file has no lines", str(comparison.prompts), "write a prompt on each line")
        rows = [tokenizer.encode(lines[i % len(lines)]) for i in range(comparison.num_sequences)]
    return [Prompt(str(i), "", "", tuple(row)) for i, row in enumerate(rows)]


def _chunks(policy: Policy, sequences: Sequence[TrainSequence]) -> Iterator[range]:
    longest = max(len(s.prompt_ids) + len(s.response_ids) for s in sequences)
    tokens = min(FORWARD_TOKENS, FORWARD_LOGITS // policy.model.config.vocab_size)
    size = max(1, tokens // longest)
    yield from (range(i, min(i + size, len(sequences))) for i in range(0, len(sequences), size))


def _engine_config(comparison: Comparison, prompts: Sequence[Prompt]) -> RolloutConfig:
    longest = max(len(prompt.token_ids) for prompt in prompts) + max(comparison.lengths)
    return RolloutConfig(
        max_model_len=longest + 1,  # scoring samples one token more
        max_num_seqs=comparison.num_sequences,
        kv_cache_gib=comparison.kv_cache_gib,
    )


def _common(a: Sample, b: Sample) -> int:
    """Number of tokens before the two differ."""
    same = [x == y for x, y in zip(a.response_ids, b.response_ids, strict=False)]
    return same.index(False) if False in same else len(same)

"""`qarl bench learner`: what aligned linears and exact numerics cost, each beside its alternative in one run.

CPU time on one thread, with the environment of training.
"""

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from launch.tools.bench.compare import HEADER, Case, compare
from qarl.errors import ConfigError
from qarl.numerics.dense import DenseWeight
from qarl.numerics.processor import threads
from qarl.numerics.vllm_patch import PROCESS_ENV
from qarl.quant.formats import check_processor, format_of
from qarl.quant.kernels import Kernel, choose_kernel
from qarl.quant.linear import QuantizedLinear, align_linears
from qarl.quant.scheme import KernelKind, QuantScheme, SchemeName
from qarl.types import Numerics, TrainSequence
from trainer.batching import Batch
from trainer.policy import Policy

LINEAR_TARGET, PROFILE_TARGET = 1.0, 1.15
TOKENS, SEQUENCE = 1024, 256  # of one forward of a layer or a block; of one of its sequences
BATCH_TOKENS, PROMPT_TOKENS, VOCABULARY = 3000, 32, 4096  # of one forward of a model
HEAD_TOKENS, HEAD_VOCABULARY = 512, 49152  # the head of SmolLM2-135M
LAYOUT_GROUPS, LAYOUT_GROUP_SIZE, LAYOUT_PROMPT, LAYOUT_RESPONSE = 4, 8, 60, 64  # as in grouped RL of short answers
KINDS: tuple[KernelKind, ...] = ("engine", "torch")
SCHEMES: tuple[SchemeName, ...] = ("w8a8_int8", "w4a16")  # of the models
PROFILES: tuple[tuple[Numerics, KernelKind], ...] = (("stock", "auto"), ("engine", "auto"), ("portable", "torch"))
CPU, PLAIN = torch.device("cpu"), "bfloat16"
Module = Callable[[Tensor], Tensor]


def bench(hidden: Sequence[int], tokens: Sequence[int], rounds: int) -> Iterator[str]:
    """The lines of the report, as soon as each is known."""
    os.environ.update(PROCESS_ENV)  # read at the first kernel, not at import
    transformers_logging.disable_progress_bar()
    torch.manual_seed(0)
    with threads(1):
        yield f"{rounds} rounds, one thread, bfloat16; {TOKENS} tokens a forward of a layer or block\n\n{HEADER}"
        schemes, missing = _schemes()
        for cases in (_linears(hidden), _blocks(hidden), _profiles(schemes, tokens), _layouts(), _heads()):
            for case in cases:
                yield from compare(case, rounds)
        yield from missing


def _linears(hidden: Sequence[int]) -> Iterator[Case]:
    """Single W8A8 layers beside the bfloat16 layer that they stand for, and what is done once per optimizer step."""
    scheme = QuantScheme("w8a8_int8", ())
    format_ = format_of(scheme)
    kernels = [choose_kernel(format_, CPU, torch.bfloat16, kind) for kind in KINDS]

    def prepare(kernel: Kernel, weight_NK: Tensor) -> None:
        kernel.prepare(format_.quantize(weight_NK), None)

    for width in hidden:
        for inputs, outputs in ((width, width), (width, 3 * width), (3 * width, width)):
            plain = nn.Linear(inputs, outputs, bias=False, dtype=torch.bfloat16)
            layers = {kernel.name: QuantizedLinear(plain, "", format_, kernel) for kernel in kernels}
            x_MK = torch.randn(TOKENS, inputs, dtype=torch.bfloat16)
            what = f"{inputs} to {outputs}"
            yield from _passes(what, {PLAIN: plain, **layers}, x_MK)
            prepares = {f"{kernel.name}, preparation": partial(prepare, kernel, plain.weight) for kernel in kernels}
            yield Case(f"{what}, once a step", {f"{PLAIN}, forward": partial(_forward, plain, x_MK), **prepares})


def _blocks(hidden: Sequence[int]) -> Iterator[Case]:
    """A Qwen3 block of transformers with W8A8 layers beside the same in bfloat16."""
    for width in hidden:
        blocks = {PLAIN: _block(_qwen3(width, layers=1))}
        for kind in KINDS:
            model = _qwen3(width, layers=1)
            align_linears(model, QuantScheme(), kind)
            blocks[f"w8a8_int8, {kind}"] = _block(model)
        x_BTE = torch.randn(TOKENS // SEQUENCE, SEQUENCE, width, dtype=torch.bfloat16)
        yield from _passes(f"block {width}", blocks, x_BTE)


def _schemes() -> tuple[list[SchemeName], list[str]]:
    """Those of `SCHEMES` that the engine has on this processor; a table row for each that it lacks."""
    schemes, missing = [], []
    for name in SCHEMES:
        try:
            check_processor(QuantScheme(name), "cpu")
        except ConfigError as error:
            missing.append(f"| {name}: {error} | | | | |")
        else:
            schemes.append(name)
    return schemes, missing


def _profiles(schemes: Sequence[SchemeName], tokens: Sequence[int]) -> Iterator[Case]:
    """Log-probs of a whole policy, forward and backward, by numerics profile; the linears are aligned in all."""
    with tempfile.TemporaryDirectory() as folder:
        _qwen3(512, layers=4).save_pretrained(folder)
        for scheme in schemes:
            policies: dict[str, Policy] = {
                numerics: Policy(folder, torch.bfloat16, QuantScheme(scheme), numerics, kernel=kernel)
                for numerics, kernel in PROFILES
            }
            for length in tokens:
                batch = _batch(max(1, BATCH_TOKENS // length), length)
                runs = {numerics: partial(_learn, policy, batch) for numerics, policy in policies.items()}
                what = f"{scheme}, {len(batch.rows)} x {length} tokens"
                yield Case(what, runs, {"engine": PROFILE_TARGET})


def _layouts() -> Iterator[Case]:
    """The same responses in a flat batch with one copy of each prompt, with a prompt for each, and padded."""
    rng = np.random.default_rng(0)

    def sequence(prompt: tuple[int, ...], length: int) -> TrainSequence:
        return TrainSequence(prompt, tuple(rng.integers(0, VOCABULARY, length).tolist()), np.zeros(length, np.float32))

    lengths = rng.integers(LAYOUT_RESPONSE // 8, LAYOUT_RESPONSE + 1, (LAYOUT_GROUPS, LAYOUT_GROUP_SIZE)).tolist()
    prompts = [tuple(rng.integers(0, VOCABULARY, LAYOUT_PROMPT).tolist()) for _ in lengths]
    shared = [sequence(prompt, n) for prompt, group in zip(prompts, lengths, strict=True) for n in group]
    # Neighbours of different prompts share nothing.
    repeated = [row for first in range(LAYOUT_GROUP_SIZE) for row in shared[first::LAYOUT_GROUP_SIZE]]
    padded = [sequence(row.prompt_ids, LAYOUT_RESPONSE) for row in repeated]
    with tempfile.TemporaryDirectory() as folder:
        _qwen3(512, layers=4).save_pretrained(folder)
        policy = Policy(folder, torch.bfloat16, QuantScheme(), "engine")
        batches = {"padded": padded, "flat": repeated, "flat, shared prompts": shared}
        runs = {name: partial(_learn, policy, Batch.of(rows, CPU)) for name, rows in batches.items()}
        yield Case(
            f"{LAYOUT_GROUPS} prompts of {LAYOUT_PROMPT} tokens x {LAYOUT_GROUP_SIZE} responses of "
            f"{LAYOUT_RESPONSE // 8} to {LAYOUT_RESPONSE}",
            runs,
        )


def _heads() -> Iterator[Case]:
    """A wide head: GEMMs of fixed numbers of rows beside one of torch's; its logits in chunks beside all at once."""
    for dtype in (torch.float32, torch.bfloat16):
        weight_NK, x_MK = (torch.randn(rows, 576, dtype=dtype) for rows in (HEAD_VOCABULARY, HEAD_TOKENS))
        runs = {"torch": partial(F.linear, x_MK, weight_NK), "fixed rows": partial(DenseWeight(weight_NK), x_MK)}
        yield Case(f"head, {str(dtype).removeprefix('torch.')}, {HEAD_TOKENS} tokens, forward", runs)
    with tempfile.TemporaryDirectory() as folder:
        _qwen3(512, layers=1, vocabulary=HEAD_VOCABULARY).save_pretrained(folder)
        whole, chunks = (Policy(folder, torch.float32, QuantScheme("none"), "engine") for _ in range(2))
        whole.head_elements, chunks.head_elements = HEAD_TOKENS * HEAD_VOCABULARY, HEAD_TOKENS * HEAD_VOCABULARY // 4
        batch = _batch(1, PROMPT_TOKENS + HEAD_TOKENS)
        both = {"at once": partial(_learn, whole, batch), "in chunks": partial(_learn, chunks, batch)}
        yield Case(f"one layer and its head, {HEAD_TOKENS} tokens, forward + backward", both)


def _passes(what: str, modules: Mapping[str, Module], x: Tensor) -> Iterator[Case]:
    """The modules' forward, then forward and backward, with the first as the alternative of the others."""
    targets = {name: LINEAR_TARGET for name in modules if name != PLAIN}
    upstream, leaf = torch.randn_like(modules[PLAIN](x)), x.clone().requires_grad_()
    yield Case(f"{what}, forward", {name: partial(_forward, m, x) for name, m in modules.items()}, targets)
    both = {name: partial(_both, m, leaf, upstream) for name, m in modules.items()}
    yield Case(f"{what}, forward + backward", both, targets)


@torch.no_grad()
def _forward(module: Module, x: Tensor) -> None:
    module(x)


def _both(module: Module, x: Tensor, upstream: Tensor) -> None:
    module(x).backward(upstream)


def _learn(policy: Policy, batch: Batch) -> None:
    policy(batch).logprobs_BT.sum().backward()


def _block(model: Any) -> Module:
    """The decoder of a one-layer model: its block and a norm. [B, T, E] -> [B, T, E]."""
    return lambda x_BTE: model.model(inputs_embeds=x_BTE, use_cache=False)[0]


def _qwen3(width: int, layers: int, vocabulary: int = VOCABULARY) -> Any:
    config = AutoConfig.for_model(
        "qwen3",
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 128,
        head_dim=64,
        vocab_size=vocabulary,
        max_position_embeddings=4096,
    )
    return AutoModelForCausalLM.from_config(config).bfloat16()


def _batch(sequences: int, length: int) -> Batch:
    """Random sequences of `length` tokens, prompt and response."""
    ids_BT = np.random.default_rng(0).integers(0, VOCABULARY, (sequences, length)).tolist()
    unused_T = np.zeros(length - PROMPT_TOKENS, np.float32)
    rows = [TrainSequence(tuple(ids[:PROMPT_TOKENS]), tuple(ids[PROMPT_TOKENS:]), unused_T) for ids in ids_BT]
    return Batch.of(rows, CPU)

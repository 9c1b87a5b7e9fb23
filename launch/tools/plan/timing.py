"""Seconds of a training step on this machine, from one and two layers of the model that run as in training."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from time import process_time
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from launch.tools.plan.speed import Load
from qarl.config.derived import kernel_of, numerics_of, rank_threads
from qarl.config.run import Config
from qarl.numerics.dense import set_gradient_precision
from qarl.numerics.processor import threads
from qarl.quant.linear import requantize
from qarl.quant.scheme import QuantScheme
from qarl.types import TrainSequence
from trainer.batching import Batch, micro_batches
from trainer.policy import Policy

ROUNDS = 2
"""Timed runs of each part, of which the shortest counts."""


@dataclass(frozen=True)
class ModelTimes:
    """Seconds of the whole model on CPU."""

    decode: float
    """Linear layers of one engine step, for one token of each sequence."""
    prefill: float
    """An engine's prompts of a step."""
    score: float
    """A forward of all that a rank learns from in a step."""
    update: float
    """A rank's optimizer steps: quantization, forward, backward, gradient norm and AdamW."""


def time_model(config: Config, model: Any, scheme: QuantScheme, load: Load, slots: int) -> ModelTimes:
    """Time one and two layers with random weights, and add the other layers.

    Args:
        model: the transformers config.
        slots: sequences that decode at once.
    """
    one, two = (np.array(_times(config, model, layers, scheme, load, slots)) for layers in (1, 2))
    return ModelTimes(*(one + (model.num_hidden_layers - 1) * (two - one)).clip(min=0).tolist())


def _times(config: Config, model: Any, layers: int, scheme: QuantScheme, load: Load, slots: int) -> list[float]:
    """The fields of `ModelTimes` for a model of this many layers."""
    policy = _policy(config, model, layers, scheme if config.learner.aligned else QuantScheme("none"))
    vocabulary, rng = model.vocab_size, np.random.default_rng(0)

    def batch(groups: int, group_size: int, prompt: int, response: int) -> list[TrainSequence]:
        rows = []
        for _ in range(groups):
            start = tuple(rng.integers(vocabulary, size=prompt).tolist())
            for _ in range(group_size):
                ids = tuple(rng.integers(vocabulary, size=response).tolist())
                rows.append(TrainSequence(start, ids, np.zeros(response, np.float32)))
        return rows

    size, prompt, response = config.train.group_size, load.prompt_tokens, max(1, round(load.response_tokens))
    decoded = Batch.of(batch(slots, 1, 1, 1), policy.device)
    prompts = Batch.of(batch(max(1, load.samples // size // load.workers), 1, prompt, 1), policy.device)
    minibatch = batch(max(1, load.samples // size // load.minibatches), size, prompt, response)
    most = config.learner.max_tokens_per_micro_batch
    parts = [[minibatch[i] for i in part] for part in micro_batches(minibatch, most, load.ranks)[0]]
    learned = [Batch.of(rows, policy.device) for rows in parts if rows]
    optimizer = torch.optim.AdamW(policy.parameters(), fused=True)

    def update() -> None:
        requantize(policy)
        optimizer.zero_grad()
        for one in learned:
            policy(one, "value").logprobs_BT.sum().backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()

    def score(batches: list[Batch]) -> None:
        with torch.no_grad():
            for one in batches:
                policy(one)

    set_gradient_precision(config.learner.gradient_precision)
    with threads(1):
        engine = [_best(lambda: score([decoded])), _best(lambda: score([prompts]))]
    with threads(rank_threads(config.learner, model.hidden_size)):
        return [*engine, load.minibatches * _best(lambda: score(learned)), load.minibatches * _best(update)]


def _policy(config: Config, model: Any, layers: int, scheme: QuantScheme) -> Policy:
    """A learner's policy of this many layers with random weights."""
    keys = model.to_dict() | {"num_hidden_layers": layers}
    if keys.get("layer_types"):
        keys["layer_types"] = (layers * keys["layer_types"])[:layers]
    dtype, numerics = getattr(torch, config.model.dtype), numerics_of(config, "cpu")
    transformers_logging.disable_progress_bar()
    with TemporaryDirectory() as folder:
        AutoModelForCausalLM.from_config(AutoConfig.for_model(**keys), dtype=dtype).save_pretrained(folder)
        policy = Policy(Path(folder), dtype, scheme, numerics, kernel=kernel_of(config, numerics, "cpu"))
    return policy.train()


def _best(run: Callable[[], None]) -> float:
    """Shortest time of a run, after one that warms up: the process's CPU time divided by its threads.

    A busy machine only blurs it; it is too short where only one of the threads works.
    """
    seconds = []
    for _ in range(ROUNDS + 1):
        started = process_time()
        run()
        seconds.append(process_time() - started)
    return min(seconds[1:]) / torch.get_num_threads()

"""All of qarl in one process, without Ray: the shortest reading of the whole system, from top to bottom.

    python -m launch.demo.minimal [key=value ...]

It trains the tiny sorter of configs/quickstart.yaml with a real vLLM engine and a real DeepSpeed learner, step by step
as `qarl train` does. That puts engine, learner and verifier into processes of their own, and adds evaluation,
checkpoints, tracking and faults. Here every stage is a plain call:

    pool --prompts--> engine --samples--> verifier --rewards--> advantages --> learner --weights--> engine
"""

import os
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from statistics import fmean

from launch.demo.tiny_model import ensure_model
from launch.run.prompts import load_prompts
from qarl.config.io import load_config
from qarl.config.run import Config
from qarl.config.schedule import scheme_at
from qarl.config.shipped import config_path
from qarl.errors import QarlError
from qarl.mismatch import Mismatch
from qarl.prompts.pool import Pool
from qarl.quant.publish import write_engine_config
from qarl.seeds import derive_seed
from qarl.types import Score
from qarl.weights.source import PublishedTensor, PublishedWeights, Tensors
from qarl.weights.wire import in_buckets
from rewards.exact import is_exact
from rollout.engine import VLLMEngine, engine_env
from trainer.collect import Group
from trainer.learner import LearnerRank, learner_env
from trainer.step import build, split, with_prox


def main(overrides: Sequence[str]) -> None:
    config = load_config(config_path("quickstart"), ["run.name=minimal", "train.steps=5", *overrides])
    env = {**engine_env("cpu", config.rollout), **learner_env("cpu", threads=1), "VLLM_LOGGING_LEVEL": "ERROR"}
    if not env.items() <= os.environ.items():  # torch and vLLM read it when they are imported: start again
        os.execve(sys.executable, [sys.executable, "-m", "launch.demo.minimal", *overrides], {**os.environ, **env})

    # The model, warm-started on demonstrations once, and the problems. The pool decides which of them are drawn.
    _, prompts, _ = load_prompts(config, print)
    ensure_model(config.model, config.task, config.seed, print, prompts)
    pool = Pool(prompts, config.pool, derive_seed(config.seed, "pool"))

    # The engine computes with vLLM's low-bit kernels (rollout.scheme: w8a8_int8). It starts without weights.
    scheme = scheme_at(config.rollout, 1)
    engine_dir = config.run.folder / "engine_model"
    write_engine_config(engine_dir, Path(config.model.path), scheme)
    engine = VLLMEngine(engine_dir, config.rollout, scheme, config.model.dtype, "cpu")

    # The learner holds full-precision masters; its forward quantizes and multiplies exactly as the engine does.
    learner = LearnerRank(config, "cpu", rank=0, world_size=1, master="127.0.0.1:0", make_sender=Mailer)
    with redirect_stdout(sys.stderr):  # DeepSpeed prints its memory
        learner.start()
    print("learner against engine:", *learner.parity(), sep="\n  ")

    publish(learner, engine, version=0)
    for step in range(1, config.train.steps + 1):
        train_step(config, pool, engine, learner, step)
        publish(learner, engine, version=step)


def train_step(config: Config, pool: Pool, engine: VLLMEngine, learner: LearnerRank, step: int) -> None:
    # Sample: a group of responses to each prompt, with the log-probs under which the engine drew them. Each request has
    # a seed of its own, so a sample depends on nothing but its request and the weights.
    sampling, size = config.rollout.sampling, config.train.group_size
    seed = partial(derive_seed, config.seed, "train", step)
    requests = [
        sampling.request(prompt, seed(prompt.id, index))
        for prompt in pool.draw(config.train.prompts_per_step, step)
        for index in range(size)
    ]
    samples = engine.generate(requests)

    # Score: 1 for the right answer, 0 otherwise. The pool learns which prompts are hard.
    scores = [Score(is_exact(sample.text, sample.finish_reason, sample.prompt.answers)) for sample in samples]
    groups = [Group(samples[i : i + size], scores[i : i + size]) for i in range(0, len(samples), size)]
    pool.observe([group.result(step) for group in groups], step)

    # Advantages: each reward against the others of its group.
    records = build(groups, config)

    # The aligned forward, without gradient: the learner's log-probs of the sampled tokens. They equal the engine's bit
    # for bit, although the weights travelled and another program computes: max |d log p| is 0. They are pi_prox.
    prox_by_index = learner.score([record.sequence for record in records])
    prox = [prox_by_index[index] for index in range(len(records))]
    gap = Mismatch.between(prox, [record.sequence.sampler_logprobs_T for record in records])
    records = with_prox(records, prox)

    # Update: for each minibatch the aligned forward with gradient (straight through the quantizer), the objective
    # (qarl/objectives: compute_loss, here TBPO), backward, and one optimizer step on the masters.
    learner.update(split(records, config.learner.minibatches, derive_seed(config.seed, "minibatches", step)))
    reward = fmean(score.reward for score in scores)
    print(f"step {step}/{config.train.steps}  reward {reward:.3f}  max |d log p| {gap.abs_max:g}", flush=True)


def publish(learner: LearnerRank, engine: VLLMEngine, version: int) -> None:
    """Quantize the masters and load them into the engine, which checks every tensor against the manifest."""
    mailbox: list[PublishedTensor] = []
    manifest = learner.send(version, [mailbox])
    assert manifest is not None
    engine.load(PublishedWeights(manifest, tuple(mailbox)))


class Mailer:
    """The learner's side of a transfer within one process: the "workers" that it sends to are lists."""

    def __init__(self, rank: int, tensors: Tensors) -> None:
        self._tensors = tensors

    def send(self, workers: Sequence[list[PublishedTensor]]) -> list[tuple[str, str]]:
        sent = [tensor for bucket in in_buckets(self._tensors()) for tensor in bucket]
        for mailbox in workers:
            mailbox.extend(sent)
        return [(tensor.name, tensor.digest) for tensor in sent]


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except QarlError as error:
        print(f"qarl: {error}", file=sys.stderr)
        sys.exit(error.exit_code)

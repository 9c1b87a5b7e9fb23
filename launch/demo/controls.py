"""What RL is compared with, for tasks with a teacher: the teacher itself, and supervised training for the same time."""

import random
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from launch.demo import tiny_model
from qarl.config.policy import ModelConfig, SFTConfig
from qarl.config.run import Config
from qarl.config.schedule import scheme_at
from qarl.model_folder import load_model, read_tokenizer
from qarl.protocols import Fleet, RewardService
from qarl.quant.publish import publish
from qarl.seeds import derive_seed
from qarl.tasks.task import Log, Task, Teacher
from qarl.types import Prompt
from trainer.evaluate import evaluate
from trainer.policy import Policy

DRAWS = 16
"""Answers of the teacher to each prompt."""


def run_controls(
    config: Config,
    task: Task,
    target: Path,
    seconds: float,
    fleet: Fleet,
    rewards: RewardService,
    heldout: Sequence[Prompt],
    log: Log,
) -> dict[str, float]:
    """Scores of the controls that `config.controls` requests, by name; none for a task without a teacher.

    Args:
        target: folder for the model of continued supervised training; replaced.
        seconds: how long that training goes on.
        fleet: evaluates it; holds its weights afterwards.
    """
    result: dict[str, float] = {}
    build = config.model.build
    if task.teacher is None or build is None:
        return result
    prompts = heldout[: config.eval.final_num_prompts]
    seed = derive_seed(config.seed, "controls")
    if config.controls.teacher:
        result["teacher"] = teacher_accuracy(task.teacher, prompts, build.sft.swap_prob, seed, DRAWS)
    if config.controls.sft_continued:
        log(f"control: supervised training continued for the {seconds:.0f} s that RL took")
        continue_sft(config.model.path, str(target), config.model, task.teacher, seconds, seed, log)
        scheme = scheme_at(config.rollout, config.train.steps)
        # It is only published: no forward, so any kernel will do on this machine.
        policy = Policy(target, getattr(torch, config.model.dtype), scheme, "stock", kernel="reference")
        fleet.load(publish(policy.model, scheme, config.train.steps + 1))
        scores = evaluate(fleet, rewards, prompts, config)
        result |= {f"sft_continued/{name}": value for name, value in scores.items() if "/" not in name}
    return result


def continue_sft(
    source: str, target: str, config: ModelConfig, teacher: Teacher, seconds: float, seed: int, log: Log
) -> int:
    """Train the model of directory `source` on fresh demonstrations for `seconds`; replaces directory `target`.

    The control for RL: same teacher, same optimizer, as much time. The learning rate warms up to its peak again and
    then falls linearly to 0 over the time. Returns the number of optimizer steps. Raises ModelError: `source` is
    no model directory or `target` cannot be written; ConfigError: `model.build` is not set.
    """
    sft = tiny_model.build_section(config).sft
    tiny_model.make_parent(Path(target))
    tokenizer = read_tokenizer(Path(source))
    model = load_model(Path(source), torch.float32)
    with tiny_model.own_torch_state(seed):
        rng = random.Random(f"sft-continued/{seed}")
        steps = tiny_model.train(model, tokenizer, sft, teacher, rng, time_schedule(sft, seconds), "", log)
    if Path(target).exists():
        shutil.rmtree(target)
    tiny_model.save(model, tokenizer, Path(target), config.dtype, {})
    return steps


def teacher_accuracy(teacher: Teacher, prompts: Sequence[Prompt], swap_prob: float, seed: int, n_draws: int) -> float:
    """Share of `n_draws` demonstrations per prompt in which the teacher's answer is right (in [0, 1])."""
    rng = random.Random(f"teacher/{seed}")
    right = [teacher.answer(p.answer, swap_prob, rng) == p.answer for p in prompts for _ in range(n_draws)]
    return sum(right) / len(right)


def time_schedule(sft: SFTConfig, seconds: float) -> Iterator[float]:
    """Learning rate factors until `seconds` have passed: linear warm-up, times a linear fall to 0 by the clock."""
    start, step = time.monotonic(), 0
    while (left := 1.0 - (time.monotonic() - start) / seconds) > 0:
        yield tiny_model.warmup(sft, step) * left
        step += 1

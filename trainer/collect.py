"""The groups of one step: draw prompts, sample responses, score them, and tell the pool the results.

Dynamic sampling then draws again, in place of uninformative groups. The pool accepts results by prompt id in any order,
so a draw need not end before the next one begins.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from statistics import fmean, pstdev

from qarl.advantages import has_variance
from qarl.config.run import Config
from qarl.errors import PublicationError, RolloutError
from qarl.prompts.allocation import allocate
from qarl.prompts.augment import Augmenter
from qarl.prompts.pool import Pool
from qarl.protocols import Fleet, RewardService
from qarl.seeds import derive_seed
from qarl.types import GroupResult, Prompt, Sample, Score
from trainer.timer import Timer

SMALLEST, LARGEST = 0.5, 2.0
"""Bounds of an allocated group's size, as multiples of `train.group_size`."""


@dataclass(frozen=True)
class Group:
    """The responses to one prompt with their scores. Raises RolloutError unless each response has one score."""

    samples: list[Sample]
    scores: list[Score]

    def __post_init__(self) -> None:
        if len(self.scores) != len(self.samples):
            prompts = {sample.prompt.id for sample in self.samples}
            raise RolloutError(f"{len(self.scores)} scores for {len(self.samples)} responses to prompts {prompts}")

    @property
    def prompt_id(self) -> str:
        return self.samples[0].prompt.id

    @property
    def rewards(self) -> list[float]:
        return [score.reward for score in self.scores]

    def result(self, drawn_at: int) -> GroupResult:
        """The group's successes for the pool; the prompt was drawn at step `drawn_at`."""
        return GroupResult(self.prompt_id, tuple(score.solved for score in self.scores), drawn_at)


class Collector:
    """Owns the order of draw, sample, score and observe."""

    def __init__(
        self, config: Config, fleet: Fleet, rewards: RewardService, pool: Pool, augmenter: Augmenter | None
    ) -> None:
        self._config, self._fleet, self._rewards, self._pool = config, fleet, rewards, pool
        self._augmenter = augmenter

    def collect(self, step: int, timer: Timer) -> tuple[list[Group], list[Group]]:
        """All groups of `step`, and those to learn from; the pool gets the results of all.

        With `train.dynamic_sampling` only groups whose rewards differ are learned from (DAPO, arXiv 2503.14476,
        section 3.2): `train.prompts_per_step` of them, or fewer when the draws or the pool run out.
        """
        config = self._config
        target, refills = config.train.prompts_per_step, config.train.dynamic_sampling
        groups: list[Group] = []
        used: list[Group] = []
        if self._augmenter:
            with timer("augment"):
                self._augmenter.resolve_pending()
        for turn in range(1 + refills):
            with timer("pool"):
                prompts = self._pool.draw(target - len(used), step)
            if turn and not prompts:
                break
            new = self._roll_out(prompts, step, timer, self._augmenter if turn == 0 else None)
            with timer("pool"):
                self._pool.observe([group.result(step) for group in new], step)
            groups += new
            used += [group for group in new if not refills or has_variance(group.rewards)]
            if len(used) == target:
                break
        return groups, used

    def _roll_out(self, prompts: Sequence[Prompt], step: int, timer: Timer, augmenter: Augmenter | None) -> list[Group]:
        sizes = self._sizes(prompts)
        sampling, seed = self._config.rollout.sampling, partial(derive_seed, self._config.seed, "train", step)
        requests = [
            sampling.request(prompt, seed(prompt.id, index))
            for prompt, size in zip(prompts, sizes, strict=True)
            for index in range(size)
        ]
        if augmenter:
            with timer("augment"):
                requests += augmenter.requests(prompts, step)
        with timer("sample"):
            samples = self._fleet.sample(requests)
        _check_versions(samples, step - 1)
        if augmenter:
            with timer("augment"):
                augmenter.receive(samples[sum(sizes) :])
        samples = samples[: sum(sizes)]
        with timer("reward"):
            scores = self._rewards.score(samples)
        ends = list(accumulate(sizes))
        return [
            Group(samples[end - size : end], scores[end - size : end]) for end, size in zip(ends, sizes, strict=True)
        ]

    def _sizes(self, prompts: Sequence[Prompt]) -> list[int]:
        size = self._config.train.group_size
        if self._config.train.allocation == "equal":
            return [size] * len(prompts)
        spread_P = [self._pool.spread(prompt.id) for prompt in prompts]
        return allocate(spread_P, size * len(prompts), max(2, int(SMALLEST * size)), int(LARGEST * size))


def _check_versions(samples: Sequence[Sample], version: int) -> None:
    if stale := {sample.version for sample in samples} - {version}:
        raise PublicationError(f"samples of weight versions {sorted(stale)} at version {version}")


def collection_metrics(groups: Sequence[Group], config: Config) -> dict[str, float]:
    """Metrics over all groups of a step, those that are not learned from included."""
    if not groups:
        return {}
    rewards = [reward for group in groups for reward in group.rewards]
    samples = [sample for group in groups for sample in group.samples]
    metrics = {
        "reward/mean": fmean(rewards),
        "reward/std": pstdev(rewards),
        "reward/accuracy": fmean(score.solved >= 1.0 for group in groups for score in group.scores),
        "reward/faults": float(sum(bool(score.error) for group in groups for score in group.scores)),
        "reward/informative_groups": fmean(has_variance(group.rewards) for group in groups),
        "response_length/mean": fmean(sample.num_sampled for sample in samples),
        "response_length/max": float(max(sample.num_sampled for sample in samples)),
        "response_length/clip_ratio": fmean(sample.finish_reason == "length" for sample in samples),
    }
    metrics |= _component_metrics([score for group in groups for score in group.scores])
    if config.train.dynamic_sampling:
        metrics["train/groups_sampled"] = float(len(groups))
    if config.train.allocation != "equal":
        metrics["train/group_size_max"] = float(max(len(group.samples) for group in groups))
        metrics["train/group_size_min"] = float(min(len(group.samples) for group in groups))
    return metrics


def _component_metrics(scores: Sequence[Score]) -> dict[str, float]:
    """Mean and standard deviation of each component over the responses that it judges, where there are several."""
    metrics: dict[str, float] = {}
    for name in scores[0].components if len(scores[0].components) > 1 else ():
        if values := [value for score in scores if not math.isnan(value := score.components[name])]:
            metrics |= {f"reward/{name}/mean": fmean(values), f"reward/{name}/std": pstdev(values)}
    return metrics

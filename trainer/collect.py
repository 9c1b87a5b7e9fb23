"""The groups of one step: draw prompts, sample and score responses, tell the pool; draw again for those that tell
nothing. The pool takes results by prompt id in any order, so nothing here needs one draw to end before the next."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import accumulate
from statistics import fmean, pstdev
from typing import Any

from qarl.advantages import has_variance, overlong_penalty
from qarl.config.run import Config
from qarl.errors import PublicationError, RolloutError
from qarl.prompts.allocation import allocate
from qarl.prompts.augment import Augmenter
from qarl.protocols import Fleet, PromptPool, RewardService
from qarl.seeds import derive_seed
from qarl.types import GroupResult, Prompt, Sample, SampleRequest, Score

LEAST_SHARE, MOST_SHARE = 0.5, 2.0
"""Bounds of an allocated group, in `train.group_size`."""


@dataclass(frozen=True)
class Group:
    """The responses to one prompt, scored. Raises RolloutError unless each has one score."""

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
        """For the pool, of which the prompt was drawn at this step."""
        return GroupResult(self.prompt_id, tuple(self.rewards), drawn_at)


class Collector:
    """Owns the order of draw, sample, score and observe.

    Args:
        timed: times a named part of the step.
        republish: called when a rollout worker was replaced: its weights are proven before its samples are used.
    """

    def __init__(
        self,
        config: Config,
        fleet: Fleet,
        rewards: RewardService,
        pool: PromptPool,
        augmenter: Augmenter | None,
        timed: Callable[[str], AbstractContextManager[None]],
        republish: Callable[[], Any],
    ) -> None:
        self._config, self._fleet, self._rewards, self._pool = config, fleet, rewards, pool
        self._augmenter, self._timed, self._republish = augmenter, timed, republish

    def collect(self, step: int) -> tuple[list[Group], list[Group]]:
        """All groups of `step`, and those to learn from.

        With `train.dynamic_sampling` these are the groups whose shaped rewards differ (DAPO, arXiv 2503.14476, section
        3.2), `train.prompts_per_step` of them unless the draws or the pool run out before; else they are all groups.
        The pool hears of every group.
        """
        config = self._config
        wanted, refills = config.train.prompts_per_step, config.train.dynamic_sampling
        groups: list[Group] = []
        used: list[Group] = []
        if self._augmenter:
            with self._timed("augment"):
                self._augmenter.resolve_pending()
        for turn in range(1 + refills):
            with self._timed("pool"):
                prompts = self._pool.draw(wanted - len(used), step)
            if turn and not prompts:
                break
            new = self._roll_out(prompts, step, self._augmenter if turn == 0 else None)
            with self._timed("pool"):
                self._pool.observe([group.result(step) for group in new], step)
            groups += new
            used += [group for group in new if not refills or has_variance(shaped_rewards(group, config))]
            if len(used) == wanted:
                break
        return groups, used

    def _roll_out(self, prompts: Sequence[Prompt], step: int, augmenter: Augmenter | None) -> list[Group]:
        sizes = self._sizes(prompts)
        sampling = self._config.rollout.sampling
        requests = [
            SampleRequest(
                prompt,
                derive_seed(self._config.seed, "train", step, prompt.id, index),
                sampling.temperature,
                sampling.max_new_tokens,
            )
            for prompt, size in zip(prompts, sizes, strict=True)
            for index in range(size)
        ]
        if augmenter:
            with self._timed("augment"):
                requests += augmenter.requests(prompts, step)
        samples = self._sample(requests, step)
        if augmenter:
            with self._timed("augment"):
                augmenter.receive(samples[sum(sizes) :])
        samples = samples[: sum(sizes)]
        with self._timed("reward"):
            scores = self._rewards.score(samples)
        ends = list(accumulate(sizes))
        return [
            Group(samples[end - size : end], scores[end - size : end]) for end, size in zip(ends, sizes, strict=True)
        ]

    def _sample(self, requests: Sequence[SampleRequest], step: int) -> list[Sample]:
        with self._timed("sample"):
            replacements = self._fleet.replacements
            samples = self._fleet.sample(requests)
        if self._fleet.replacements != replacements:
            self._republish()
        stale = {sample.version for sample in samples} - {step - 1}
        if stale:
            raise PublicationError(f"samples of weight versions {sorted(stale)} at version {step - 1}")
        return samples

    def _sizes(self, prompts: Sequence[Prompt]) -> list[int]:
        size = self._config.train.group_size
        if self._config.train.allocation == "equal":
            return [size] * len(prompts)
        spread_P = [self._pool.spread(prompt.id) for prompt in prompts]
        return allocate(spread_P, size * len(prompts), max(2, int(LEAST_SHARE * size)), int(MOST_SHARE * size))


def shaped_rewards(group: Group, config: Config) -> list[float]:
    """What advantages are made of: rewards with DAPO's punishment of overlong responses."""
    longest, cache = config.rollout.sampling.max_new_tokens, config.advantage.overlong_cache
    lengths = [len(sample.response_ids) for sample in group.samples]
    return [
        reward + overlong_penalty(length, longest, cache) for reward, length in zip(group.rewards, lengths, strict=True)
    ]


def collection_metrics(groups: Sequence[Group], config: Config) -> dict[str, float]:
    """Over all groups of a step, dropped ones included."""
    if not groups:
        return {}
    rewards = [reward for group in groups for reward in group.rewards]
    samples = [sample for group in groups for sample in group.samples]
    metrics = {
        "reward/mean": fmean(rewards),
        "reward/std": pstdev(rewards),
        "reward/accuracy": fmean(reward >= 1.0 for reward in rewards),
        "reward/faults": float(sum(bool(score.error) for group in groups for score in group.scores)),
        "reward/informative_groups": fmean(has_variance(group.rewards) for group in groups),
        "response_length/mean": fmean(len(sample.response_ids) for sample in samples),
        "response_length/max": float(max(len(sample.response_ids) for sample in samples)),
        "response_length/clip_ratio": fmean(sample.finish_reason == "length" for sample in samples),
    }
    if config.train.dynamic_sampling:
        metrics["train/groups_sampled"] = float(len(groups))
    if config.train.allocation != "equal":
        metrics["train/group_size_max"] = float(max(len(group.samples) for group in groups))
        metrics["train/group_size_min"] = float(min(len(group.samples) for group in groups))
    return metrics

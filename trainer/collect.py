"""The groups of one step: draw prompts, sample responses, score them, and tell the pool the results.

Groups come as they finish, and are scored while others are still sampled. Dynamic sampling then draws again, in place
of uninformative groups.
"""

import math
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from statistics import fmean, median, pstdev
from time import monotonic

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
WAIT_S = 0.1
"""Longest wait for a group before stragglers and scores are looked at."""


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


@dataclass
class _Flight:
    """A group from its draw until a step takes it."""

    prompt: Prompt
    drawn_at: int
    started: float
    seconds: float = math.inf
    """How long it was sampled; infinite while it is."""
    samples: list[Sample] = field(default_factory=list)
    group: Group | None = None
    """With its scores."""


class Collector:
    """Owns the order of draw, sample, score and observe. A thread scores: meanwhile groups go out to workers."""

    def __init__(
        self, config: Config, fleet: Fleet, rewards: RewardService, pool: Pool, augmenter: Augmenter | None
    ) -> None:
        self._config, self._fleet, self._rewards, self._pool = config, fleet, rewards, pool
        self._augmenter = augmenter
        self._flights: dict[int, _Flight] = {}  # by number of the fleet's group, in the order of the draws
        self._asked: dict[int, list[Sample]] = {}  # the augmenter's groups, likewise
        self._unscored: list[_Flight] = []
        self._thread = ThreadPoolExecutor(1, "scores")
        self._scoring: tuple[list[_Flight], Future[list[Score]]] | None = None
        self._stragglers = 0  # groups given back in this step

    def collect(self, step: int, timer: Timer) -> tuple[list[Group], list[Group]]:
        """All groups of `step`, and those to learn from; the pool gets the results of all.

        With `train.dynamic_sampling` only groups whose rewards differ are learned from (DAPO, arXiv 2503.14476,
        section 3.2): `train.prompts_per_step` of them, or fewer when the draws or the pool run out.
        """
        config = self._config
        target, refills = config.train.prompts_per_step, config.train.dynamic_sampling
        groups: list[Group] = []
        used: list[Group] = []
        self._stragglers = 0
        if self._augmenter:
            with timer("augment"):
                self._augmenter.resolve_pending()
        for turn in range(1 + refills):
            with timer("pool"):
                prompts = self._pool.draw(target - len(used), step)
            if turn and not prompts:
                break
            self._submit(prompts, step, timer, self._augmenter if turn == 0 else None)
            new = self._take(step, timer)
            with timer("pool"):
                self._pool.observe([group.result(step) for group in new], step)
            groups += new
            used += [group for group in new if not refills or has_variance(group.rewards)]
            if len(used) == target:
                break
        return groups, used

    def metrics(self) -> dict[str, float]:
        if self._config.rollout.stragglers.kind == "wait":
            return {}
        return {"train/stragglers": float(self._stragglers)}

    def _submit(self, prompts: Sequence[Prompt], step: int, timer: Timer, augmenter: Augmenter | None) -> None:
        sampling, seed = self._config.rollout.sampling, partial(derive_seed, self._config.seed, "train", step)
        requests = [
            [sampling.request(prompt, seed(prompt.id, index)) for index in range(size)]
            for prompt, size in zip(prompts, self._sizes(prompts), strict=True)
        ]
        if augmenter:
            with timer("augment"):
                requests += [[request] for request in augmenter.requests(prompts, step)]
        numbers = self._fleet.submit(requests)
        now = monotonic()
        self._flights |= {number: _Flight(prompt, step, now) for number, prompt in zip(numbers, prompts, strict=False)}
        self._asked = {number: [] for number in numbers[len(prompts) :]}

    def _take(self, step: int, timer: Timer) -> list[Group]:
        """The groups of the draw, in its order, as soon as all are scored."""
        with timer("sample"):
            while not all(self._asked.values()) or not all(flight.samples for flight in self._due()):
                self._advance()
        _check_versions([s for samples in self._asked.values() for s in samples], step - 1)
        if self._augmenter and self._asked:
            with timer("augment"):
                self._augmenter.receive([sample for samples in self._asked.values() for sample in samples])
        self._asked = {}
        with timer("reward"):
            while self._scoring:
                self._score(None)
        taken, self._flights = list(self._flights.values()), {}
        groups = [flight.group for flight in taken if flight.group]
        _check_versions([sample for group in groups for sample in group.samples], step - 1)
        return groups

    def _due(self) -> list[_Flight]:
        """The groups that the step waits for; stragglers are given back."""
        late = self._late()
        if late:
            self._stragglers += len(late)
            self._fleet.abort(late)
            self._pool.abort([self._flights.pop(number).prompt.id for number in late])
        return list(self._flights.values())

    def _late(self) -> list[int]:
        """Numbers of the groups that have been sampled for too long."""
        rule, flights = self._config.rollout.stragglers, self._flights
        if rule.kind == "wait" or not flights:
            return []
        limit = rule.after_s or rule.times_median * median(flight.seconds for flight in flights.values())
        now = monotonic()
        return [n for n, flight in flights.items() if not flight.samples and now - flight.started > limit]

    def _advance(self) -> None:
        """Wait a moment for groups to finish, and have them scored."""
        for number, samples in self._fleet.poll(WAIT_S).items():
            if number in self._asked:
                self._asked[number] = samples
                continue
            flight = self._flights[number]
            flight.samples, flight.seconds = samples, monotonic() - flight.started
            self._unscored.append(flight)
        self._score(0.0)

    def _score(self, timeout_s: float | None) -> None:
        """Take the scores, if they are there within `timeout_s`, and have all scored that has come in meanwhile."""
        if self._scoring:
            flights, scores = self._scoring
            if not wait([scores], timeout_s).done:
                return
            rest = iter(scores.result())
            for flight in flights:
                flight.group = Group(flight.samples, list(islice(rest, len(flight.samples))))
            self._scoring = None
        if self._unscored:
            flights, self._unscored = self._unscored, []
            samples = [sample for flight in flights for sample in flight.samples]
            self._scoring = flights, self._thread.submit(self._rewards.score, samples)

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

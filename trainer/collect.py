"""The groups of one step: draw prompts, sample responses, score them, and tell the pool the results.

Groups come as they finish, and are scored while others are still sampled. Dynamic sampling then draws again, in place
of uninformative groups; a step that samples ahead takes those of later steps.
"""

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import groupby, islice
from operator import itemgetter
from statistics import fmean, median, pstdev

from qarl.advantages import has_variance
from qarl.config.run import Config
from qarl.errors import PublicationError, RolloutError
from qarl.prompts.allocation import allocate
from qarl.prompts.augment import Augmenter
from qarl.prompts.pool import Pool
from qarl.protocols import Fleet, RewardService
from qarl.seeds import derive_seed
from qarl.types import GroupResult, Prompt, Sample, Score
from trainer.clock import Clock
from trainer.timer import Timer

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


@dataclass(eq=False)
class _Flight:
    """A group from its draw until a step takes it."""

    prompt: Prompt
    drawn_at: int
    started: float
    """When it was last seen to wait for a worker."""
    begun: int
    """The weight version of the engines then."""
    seconds: float = math.inf
    """How long it was sampled; infinite until it is finished."""
    samples: list[Sample] = field(default_factory=list)
    group: Group | None = None
    """With its scores."""
    is_checked: bool = False
    """Its weight versions were those that engines may have had when it came."""

    @cached_property
    def version(self) -> int:
        """The oldest one that sampled a token of the group."""
        return min(sample.versions[0] for sample in self.samples)

    @property
    def scored(self) -> Group:
        assert self.group is not None
        return self.group


class Collector:
    """Owns the order of draw, sample, score and observe. A thread scores: meanwhile groups go out to workers."""

    def __init__(
        self,
        config: Config,
        fleet: Fleet,
        rewards: RewardService,
        pool: Pool,
        augmenter: Augmenter | None,
        clock: Clock,
    ) -> None:
        self._config, self._fleet, self._rewards, self._pool = config, fleet, rewards, pool
        self._augmenter, self._clock = augmenter, clock
        self._flights: dict[int, _Flight] = {}  # by number of the fleet's group, in the order of the draws
        self._asked: dict[int, list[Sample]] = {}  # the augmenter's groups, likewise
        self._unscored: list[_Flight] = []
        self._thread = clock.thread("scores")
        self._scoring: tuple[list[_Flight], Future[list[Score]]] | None = None
        self._given_back = {"train/stragglers": 0, "train/too_old": 0}  # groups of this step
        self._kept = 0  # groups whose turn it is, but for which this step does not wait
        self._published = 0  # version of the engines' weights

    def collect(self, step: int, timer: Timer) -> tuple[list[Group], list[Group]]:
        """All groups of `step`, and those to learn from; the pool gets the results of all.

        With `train.dynamic_sampling` only groups whose rewards differ are learned from (DAPO, arXiv 2503.14476,
        section 3.2): `train.prompts_per_step` of them, or fewer when the draws or the pool run out. With
        `train.max_staleness` the groups of later steps are drawn, too, and no step waits for what the augmenter asks.
        """
        train = self._config.train
        target, refills = train.prompts_per_step, train.dynamic_sampling
        ahead = target * min(train.steps_ahead, train.steps - step)
        groups: list[Group] = []
        used: list[Group] = []
        self._given_back, self._kept = dict.fromkeys(self._given_back, 0), 0
        if self._augmenter:
            with timer("augment"):
                self._augmenter.resolve_pending()
        for turn in range(1 + refills):
            with timer("pool"):
                prompts = self._pool.draw(max(0, target - len(used) + ahead - len(self._flights)), step)
            if turn and not prompts and not self._flights:
                break
            self._submit(prompts, step, timer, None if turn or self._asked else self._augmenter)
            new = self._take(target - len(used), step, timer)
            with timer("pool"):
                self._pool.observe([flight.scored.result(flight.drawn_at) for flight in new], step)
            groups += [flight.scored for flight in new]
            used += [flight.scored for flight in new if not refills or has_variance(flight.scored.rewards)]
            if len(used) == target:
                break
        return groups, used

    def metrics(self) -> dict[str, float]:
        if self._config.rollout.stragglers.kind == "wait":
            return {}
        return {name: float(count) for name, count in self._given_back.items()} | {"train/kept": float(self._kept)}

    def why_none(self) -> str:
        """Why this step has no groups."""
        stragglers, too_old = self._given_back.values()
        if stragglers or too_old:
            return f"all groups went back to the pool, {stragglers} as stragglers, {too_old} as too old"
        return "no prompt could be drawn, all rest or are retired"

    def in_flight(self) -> list[tuple[str, int]]:
        """Prompts that no step has taken, with the step of their draw."""
        return [(flight.prompt.id, flight.drawn_at) for flight in self._flights.values()]

    def resume(self, in_flight: Sequence[tuple[str, int]]) -> None:
        """Sample again what was in flight when a checkpoint was written, from the weights of now."""
        for drawn_at, of_draw in groupby(in_flight, key=itemgetter(1)):
            prompts = self._pool.draw_again([prompt_id for prompt_id, _ in of_draw], drawn_at)
            self._submit(prompts, drawn_at, Timer(), None)

    def give_back(self) -> int:
        """Forget all that is in flight, and return its prompts to the pool; returns how many groups that were."""
        self._fleet.abort([number for number, samples in self._asked.items() if not samples])
        self._asked, numbers = {}, list(self._flights)
        self._forget(numbers)
        return len(numbers)

    def advance(self, timeout_s: float = WAIT_S) -> bool:
        """Wait a moment for groups to finish, and have them scored; False when nothing is sampled."""
        for number, samples in self._fleet.poll(timeout_s).items():
            if number in self._asked:
                self._asked[number] = samples
                continue
            flight = self._flights[number]
            flight.samples, flight.seconds = samples, self._clock.now() - flight.started
            self._unscored.append(flight)
        self._see_queued()
        self._score(0.0)
        return not all(flight.samples for flight in self._flights.values())

    def published(self, version: int) -> None:
        """The engines have the weights of `version` now."""
        self._published = version
        self._see_queued()

    @contextmanager
    def while_others_sample(self) -> Iterator[None]:
        """Groups that wait for a worker may get one meanwhile, unseen: they count as begun when the others are done."""
        waiting = self._fleet.queued() & self._flights.keys()
        yield
        for number in waiting:
            self._flights[number].started = self._clock.now()

    def wait_for_scores(self) -> None:
        """Until all that was sampled is scored: others may use the reward service then."""
        while self._scoring:
            self._score(None)

    def _submit(self, prompts: Sequence[Prompt], step: int, timer: Timer, augmenter: Augmenter | None) -> None:
        rollout, seed = self._config.rollout, partial(derive_seed, self._config.seed, "train", step)
        groups = [
            [rollout.sampling.request(prompt, seed(prompt.id, index)) for index in range(size)]
            for prompt, size in zip(prompts, self._sizes(prompts), strict=True)
        ]
        if augmenter:
            with timer("augment"):
                groups += [[request] for request in augmenter.requests(prompts, step)]
        numbers = self._fleet.submit([[replace(one, partial=rollout.partial) for one in group] for group in groups])
        now = self._clock.now()
        flights = [_Flight(prompt, step, now, self._published) for prompt in prompts]
        self._flights |= zip(numbers, flights, strict=False)
        self._asked |= {number: [] for number in numbers[len(prompts) :]}

    def _take(self, count: int, step: int, timer: Timer) -> list[_Flight]:
        """The next `count` groups in the order of the draws, or as many as there are, as soon as all are scored."""
        with timer("sample"):
            self.advance(0.0)  # what finished during a publication or an evaluation is no straggler
            due, is_ahead = self._due(count, step), self._config.train.max_staleness > 0
            while not all(flight.samples for flight in due) or not (is_ahead or all(self._asked.values())):
                self.advance()
                due = self._due(count, step)
        if self._augmenter and self._asked and all(self._asked.values()):
            for samples in self._asked.values():
                self._check_versions(samples, step - 1)
            with timer("augment"):
                self._augmenter.receive([sample for samples in self._asked.values() for sample in samples])
            self._asked = {}
        with timer("reward"):
            self.wait_for_scores()
        taken = set(due)
        self._flights = {number: flight for number, flight in self._flights.items() if flight not in taken}
        return due

    def _due(self, count: int, step: int) -> list[_Flight]:
        """The groups that `step` waits for. Stragglers are not among them, nor groups that are too old, or will be."""
        for flight in self._flights.values():
            if flight.samples and not flight.is_checked:
                self._check_versions(flight.samples, step - 1)
                flight.is_checked = True
        limit = step - 1 - self._config.train.max_staleness
        self._give_back("train/too_old", [n for n, f in self._flights.items() if f.samples and f.version < limit])
        late = self._late()
        if self._config.rollout.stragglers.kind == "return":
            self._give_back("train/stragglers", late)
        else:
            self._give_back("train/too_old", [number for number in late if self._flights[number].begun < limit])
        not_due, flights = set(late), list(self._flights.values())
        due = ([flight for number, flight in self._flights.items() if number not in not_due] or flights)[:count]
        self._kept = len(set(flights[:count]).difference(due))
        return due

    def _give_back(self, why: str, numbers: Sequence[int]) -> None:
        if numbers:
            self._given_back[why] += len(numbers)
            self._forget(numbers)

    def _forget(self, numbers: Sequence[int]) -> None:
        """Return the prompts of these groups to the pool."""
        self._fleet.abort([number for number in numbers if not self._flights[number].samples])
        self._pool.abort([self._flights.pop(number).prompt.id for number in numbers])

    def _see_queued(self) -> None:
        """The groups that no worker has yet begin at the earliest now, from the weights of now."""
        for number in self._fleet.queued() & self._flights.keys():
            self._flights[number].started, self._flights[number].begun = self._clock.now(), self._published

    def _late(self) -> list[int]:
        """Numbers of the groups that have been sampled for too long."""
        rule, flights = self._config.rollout.stragglers, self._flights
        if rule.kind == "wait" or not flights:
            return []
        limit = rule.after_s or rule.times_median * median(flight.seconds for flight in flights.values())
        now = self._clock.now()
        return [n for n, flight in flights.items() if not flight.samples and now - flight.started > limit]

    def _score(self, timeout_s: float | None) -> None:
        """Take the scores, if they are there within `timeout_s`, and have all scored that has come in meanwhile."""
        if self._scoring:
            flights, scores = self._scoring
            if not self._clock.wait(scores, timeout_s):
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
        train = self._config.train
        if train.allocation == "equal":
            return [train.group_size] * len(prompts)
        spread_P = [self._pool.spread(prompt.id) for prompt in prompts]
        return allocate(spread_P, train.group_size * len(prompts), max(2, train.group_size // 2), train.largest_group)

    def _check_versions(self, samples: Sequence[Sample], version: int) -> None:
        """Raises PublicationError: samples of weights that the engines should not have."""
        found = {one for sample in samples for one in sample.versions}
        in_turn = not self._config.train.max_staleness
        may_mix = self._config.rollout.partial or self._config.environment.kind != "none"
        if (len(found) > 1 and not may_mix) or any(one > version or (in_turn and one < version) for one in found):
            raise PublicationError(f"samples of weight versions {sorted(found - {version})} at version {version}")


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

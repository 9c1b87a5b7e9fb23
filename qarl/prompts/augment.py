"""New problems, which the policy makes from prompts at the frontier while it trains; after HeaPA.

    prompts of the draw --template--> policy --pattern--> question --checks--> queue --validator--> pool
                                                parse, length, leak, duplicate     invalid, full

The questions are asked, and votes cast, with the rollouts of a step. Verdicts are taken at the beginning of later
steps, in the order of the queue and up to the first that is not known yet: no step waits for one, and a run that is
resumed goes on as it would have.
"""

from __future__ import annotations

import math
import re
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from random import Random
from typing import Any

from qarl.config.pool import AugmentConfig
from qarl.errors import CheckpointError, RolloutError
from qarl.prompts.pool import Pool
from qarl.prompts.validate import Validator
from qarl.seeds import derive_seed
from qarl.tasks.task import Task
from qarl.tasks.text import HeldoutIndex, TextIndex
from qarl.types import AugmentOutcome, Prompt, Sample, SampleRequest

VERSION = 1
REASONS = ("parse", "length", "leak", "duplicate", "budget", "invalid", "full")
"""Why a reply is refused: the pattern or the task's form does not fit; it has too many tokens; it gives away a held-out
question; the pool has, or has refused, one like it; the validator's budget is spent; the validator refused; the pool is
at capacity and no prompt in it is further from the target."""
WHERE = "augmentation state"


@dataclass
class Candidate:
    """A new question that waits for its answer. `replies` are the policy's votes, where the validator wants any."""

    question: str
    parent_id: str
    level: int
    replies: list[str] = field(default_factory=list)


class Augmenter:
    """Grows `pool`.

    Args:
        config, seed: what to ask for, and the run's seed.
        task: makes and reads the questions.
        known: prompts whose questions are taken: those of the task.
        heldout: further held-out questions, besides those that `task` lists.
        sampling: temperature and longest response, in tokens, of the requests.
        longest_prompt: in tokens, of what is asked and of what is made.
    """

    def __init__(
        self,
        config: AugmentConfig,
        pool: Pool,
        task: Task,
        validator: Validator,
        known: Iterable[Prompt],
        heldout: Iterable[Prompt],
        sampling: tuple[float, int],
        longest_prompt: int,
        seed: int,
    ) -> None:
        self._config, self._pool, self._task, self._validator = config, pool, task, validator
        self._sampling, self._longest_prompt, self._seed = sampling, longest_prompt, seed
        self._heldout = HeldoutIndex(config.ngram, task.heldout_questions())
        for prompt in heldout:
            self._heldout.add(task.question(prompt))
        self._known = TextIndex(config.ngram, map(task.question, known))
        self._queued: list[str] = []  # every question that was ever in the queue
        self._queue: deque[Candidate] = deque()
        self._asked: list[Prompt] = []  # parents, in the order of the last requests
        self._voting: list[Candidate] = []  # likewise
        self._requested: list[str] = []  # ids of the last requests' prompts
        self._counts: Counter[str] = Counter()
        self._outcomes: list[AugmentOutcome] = []

    def resolve_pending(self) -> None:
        """Put the problems whose verdict is known into the pool, in the order of the queue."""
        while self._queue:
            candidate = self._queue[0]
            verdict = self._validator.verdict(candidate.question, candidate.replies)
            if verdict is None:
                return
            self._queue.popleft()
            if verdict.answer is None:
                self._conclude(candidate.parent_id, candidate.question, "invalid", verdict.reason)
                continue
            prompt = self._task.prompt(candidate.question, verdict.answer, candidate.level)
            reason = "" if self._pool.add(prompt, candidate.parent_id) else "full"
            self._conclude(candidate.parent_id, candidate.question, reason, answer=verdict.answer)

    def requests(self, drawn: Sequence[Prompt], step: int) -> list[SampleRequest]:
        """What the policy is to be sampled for together with the rollouts of `step`, whose prompts are `drawn`."""
        config, rng = self._config, Random(derive_seed(self._seed, "augment", step))
        frontier = set(self._pool.frontier([prompt.id for prompt in drawn], config.reach))
        parents = [prompt for prompt in drawn if prompt.id in frontier]
        room = max(0, config.max_pending - len(self._queue))
        self._asked, self._voting, requests = [], [], []
        for parent in rng.sample(parents, min(config.per_step, room, len(parents))):
            self._counts["requested"] += 1
            text = self._fill(parent)
            tokens = tuple(self._task.encode(text))
            if len(tokens) > self._longest_prompt:
                self._conclude(parent.id, text, "length", f"asking takes {len(tokens)} tokens")
                continue
            self._asked.append(parent)
            requests.append(self._request(Prompt(f"augment/{step}/{parent.id}", text, "", tokens), step, 0))
        for candidate in self._queue:
            if self._validator.votes and not candidate.replies:
                self._voting.append(candidate)
                prompt = self._task.prompt(candidate.question, "", candidate.level)
                requests += [self._request(prompt, step, index) for index in range(self._validator.votes)]
        self._requested = [request.prompt.id for request in requests]
        return requests

    def receive(self, samples: Sequence[Sample]) -> None:
        """The samples of the last `requests`, in their order. Raises RolloutError when they are of others."""
        if strange := [
            s.prompt.id for s, i in zip_longest(samples, self._requested[: len(samples)]) if s.prompt.id != i
        ]:
            raise RolloutError(
                f"a sample of '{strange[0]}', which the last requests did not ask for", where="augmentation"
            )
        for parent, sample in zip(self._asked, samples, strict=False):
            self._read(parent, sample)
        replies = [sample.text if sample.finish_reason == "stop" else "" for sample in samples[len(self._asked) :]]
        votes = self._validator.votes
        for i, candidate in enumerate(self._voting):
            candidate.replies = replies[i * votes : (i + 1) * votes]
        self._asked, self._voting, self._requested = [], [], []

    def outcomes(self) -> list[AugmentOutcome]:
        """What was concluded since the last call."""
        found, self._outcomes = self._outcomes, []
        return found

    def metrics(self) -> dict[str, float]:
        """Counts since the start of the run: requested, accepted, rejected by reason; `pending` ones wait in the queue,
        `acceptance` is the share of accepted ones among the concluded.
        """
        counts, accepted = self._counts, self._counts["accepted"]
        rejected = {f"rejected_{reason}": float(counts[reason]) for reason in REASONS}
        concluded = accepted + sum(rejected.values())
        values = {"requested": counts["requested"], "accepted": accepted, **rejected, "pending": len(self._queue)}
        values["acceptance"] = accepted / concluded if concluded else 0.0
        return {f"augment/{name}": float(value) for name, value in values.items()}

    def state_dict(self) -> dict[str, Any]:
        """What later steps depend on besides the pool, ready for JSON; between `receive` and the next `requests`."""
        queue = [asdict(candidate) for candidate in self._queue]
        return {"version": VERSION, "queued": self._queued, "queue": queue, "counts": dict(self._counts)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`, in a new augmenter; the validator gets the queue again.

        Raises:
            CheckpointError: another version, or damaged.
        """
        if state.get("version") != VERSION:
            raise CheckpointError(f"version {state.get('version')}, this qarl reads {VERSION}", WHERE)
        try:
            queue, queued = [_candidate(row) for row in state["queue"]], _texts(state["queued"])
            counts = Counter({_texts([name])[0]: _whole(count, least=0) for name, count in state["counts"].items()})
            if strange := {candidate.question for candidate in queue}.difference(queued):
                raise ValueError(f"'{min(strange)}' waits and was never queued")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"incomplete or damaged ({error!r})", WHERE) from error
        self._counts = counts
        for question in queued:
            self._remember(question)
        for candidate in queue:
            self._queue.append(candidate)
            self._validator.submit(candidate.question)

    def close(self) -> None:
        self._validator.close()

    def _fill(self, parent: Prompt) -> str:
        question = self._task.question(parent)
        parts = {"question": question, "answer": parent.answer, "beginning": beginning(question)}
        return re.sub(r"\{(question|answer|beginning)\}", lambda match: parts[match[1]], self._config.template)

    def _request(self, prompt: Prompt, step: int, index: int) -> SampleRequest:
        seed = derive_seed(self._seed, "augment", step, prompt.id, index)
        return SampleRequest(prompt, seed, *self._sampling)

    def _read(self, parent: Prompt, sample: Sample) -> None:
        """Queue the question that the reply holds, or refuse it."""
        text = sample.text
        if self._config.template.endswith("{beginning}"):
            text = beginning(self._task.question(parent)) + text
        found = re.findall(self._config.pattern, text, re.DOTALL)
        question = found[0].strip() if len(found) == 1 and sample.finish_reason == "stop" else ""
        if not self._task.is_well_formed(question):
            what = "cut short" if sample.finish_reason != "stop" else f"the pattern matches {len(found)} times"
            self._conclude(parent.id, text, "parse", what if not question else "not of the task's form")
            return
        reason, detail = self._check(question)
        if reason:
            self._conclude(parent.id, question, reason, detail)
            return
        self._remember(question)
        self._queue.append(Candidate(question, parent.id, parent.level))
        self._validator.submit(question)

    def _check(self, question: str) -> tuple[str, str]:
        """Why `question` may not join the queue, and the detail; empty when it may."""
        config = self._config
        if self._task.is_heldout(question):
            return "leak", "held out by the task's rule"
        if (overlap := self._heldout.overlap(question)) >= config.max_heldout_overlap:
            return "leak", f"overlap {overlap:.2f} with a held-out question"
        if (overlap := self._known.overlap(question)) >= config.max_overlap:
            return "duplicate", f"overlap {overlap:.2f}"
        tokens = len(self._task.prompt(question, "", 0).token_ids)
        if tokens > self._longest_prompt:
            return "length", f"{tokens} tokens"
        if config.budget and len(self._queued) >= config.budget:
            return "budget", ""
        return "", ""

    def _remember(self, question: str) -> None:
        self._queued.append(question)
        self._known.add(question)

    def _conclude(self, parent_id: str, text: str, reason: str, detail: str = "", answer: str = "") -> None:
        self._counts[reason or "accepted"] += 1
        self._outcomes.append(AugmentOutcome(parent_id, text, reason, detail, answer))


def _candidate(row: Mapping[str, Any]) -> Candidate:
    """Raises TypeError or ValueError when `row` is none."""
    found = Candidate(**row)
    _texts([found.question, found.parent_id])
    _texts(found.replies)
    _whole(found.level)
    return found


def _whole(value: Any, least: float = -math.inf) -> int:
    """Raises TypeError when `value` is no whole number from `least`."""
    if type(value) is not int or value < least:
        raise TypeError(f"{value!r:.60} is no count")
    return value


def _texts(values: Any) -> list[str]:
    """Raises TypeError when `values` is no list of texts."""
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise TypeError(f"{values!r:.60} are no texts")
    return values


def beginning(question: str) -> str:
    """The first half of `question`, back to the end of a word where it has several."""
    half = question[: len(question) // 2]
    return half.rpartition(" ")[0] or half

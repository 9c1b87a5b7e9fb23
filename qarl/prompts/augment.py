"""The policy writes new problems, from prompts at the frontier, while it trains; after HeaPA.

    prompts of the draw --template--> policy --pattern--> question --checks--> queue --validator--> pool
                                                parse, length, leak, duplicate     invalid, full

The policy is sampled for questions and votes together with a step's rollouts. Later steps begin by reading verdicts, in
the order of the queue, up to the first that is not available yet. No step waits for a verdict, and a resumed run
continues as if it had not stopped (with `train.max_staleness`, but for requests whose samples were not there yet).
"""

import re
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import zip_longest
from random import Random
from typing import Annotated, Any, ClassVar

from pydantic import ConfigDict, Field, TypeAdapter

from qarl.config.base import Count
from qarl.config.policy import SamplingConfig
from qarl.config.pool import AugmentConfig
from qarl.errors import DAMAGED, OTHER_VERSION, CheckpointError, RolloutError
from qarl.prompts.pool import Pool
from qarl.prompts.validate import Validator
from qarl.seeds import derive_seed
from qarl.tasks.task import Task
from qarl.tasks.text import HeldoutIndex, TextIndex
from qarl.types import AugmentOutcome, Prompt, Sample, SampleRequest

VERSION = 1
REASONS = ("parse", "length", "leak", "duplicate", "budget", "invalid", "full")
"""Why a question is refused, in the order of the names: the reply does not match the pattern or the task's form; it has
too many tokens; it resembles a held-out question; it resembles a question that was seen before; the validator's budget
is spent; the validator refused it; the pool is full and no prompt in it is farther from the target."""
WHERE = "augmentation state"


@dataclass
class Candidate:
    """A new question without an answer yet. `replies` are the policy's votes, if the validator needs any."""

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid")

    question: str
    parent_id: str
    level: Annotated[int, Field(strict=True)]
    source: str = ""
    replies: list[str] = field(default_factory=list)


_QUEUE, _TEXTS, _COUNTS = TypeAdapter(list[Candidate]), TypeAdapter(list[str]), TypeAdapter(dict[str, Count])


class Augmenter:
    """Grows `pool`.

    Args:
        config: the quota, the template and the checks.
        task: makes and reads the questions.
        known: prompts whose questions may not be repeated.
        heldout: further held-out questions, besides those that `task` lists.
        sampling: of the requests; those for a new problem have no stop strings.
        longest_prompt: most tokens of a request and of a new prompt.
    """

    def __init__(
        self,
        config: AugmentConfig,
        pool: Pool,
        task: Task,
        validator: Validator,
        known: Iterable[Prompt],
        heldout: Iterable[Prompt],
        sampling: SamplingConfig,
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
        self._parents: list[Prompt] = []  # of the last requests, in their order
        self._voting: list[Candidate] = []  # likewise
        self._request_ids: list[str] = []  # prompt ids of the last requests
        self._counts: Counter[str] = Counter()
        self._outcomes: list[AugmentOutcome] = []

    def resolve_pending(self) -> None:
        """Read the available verdicts, in the order of the queue; problems with an answer enter the pool."""
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
            prompt = replace(prompt, source=candidate.source)
            reason = "" if self._pool.add(prompt, candidate.parent_id) else "full"
            self._conclude(candidate.parent_id, candidate.question, reason, answer=verdict.answer)

    def requests(self, drawn: Sequence[Prompt], step: int) -> list[SampleRequest]:
        """Requests to sample together with the rollouts of `step`, whose prompts are `drawn`."""
        config, rng = self._config, Random(derive_seed(self._seed, "augment", step))
        frontier = set(self._pool.frontier([prompt.id for prompt in drawn], config.reach))
        parents = [prompt for prompt in drawn if prompt.id in frontier]
        room = max(0, config.max_pending - len(self._queue))
        self._parents, self._voting, requests = [], [], []
        for parent in rng.sample(parents, min(config.per_step, room, len(parents))):
            self._counts["requested"] += 1
            text = self._fill(parent)
            tokens = tuple(self._task.encode(text))
            if len(tokens) > self._longest_prompt:
                self._conclude(parent.id, text, "length", f"the request has {len(tokens)} tokens")
                continue
            self._parents.append(parent)
            request = self._request(Prompt(f"augment/{step}/{parent.id}", text, "", tokens), step, 0)
            requests.append(replace(request, stop=()))
        for candidate in self._queue:
            if self._validator.votes and not candidate.replies:
                self._voting.append(candidate)
                prompt = self._task.prompt(candidate.question, "", candidate.level)
                requests += [self._request(prompt, step, index) for index in range(self._validator.votes)]
        self._request_ids = [request.prompt.id for request in requests]
        return requests

    def receive(self, samples: Sequence[Sample]) -> None:
        """Read the samples of the last `requests`, in their order. Raises RolloutError for any other sample."""
        for sample, expected in zip_longest(samples, self._request_ids[: len(samples)]):
            if sample.prompt.id != expected:
                what = f"a sample of '{sample.prompt.id}', which is not in the last requests"
                raise RolloutError(what, where="augmentation")
        for parent, sample in zip(self._parents, samples, strict=False):
            self._read(parent, sample)
        replies = [sample.text if sample.finish_reason == "stop" else "" for sample in samples[len(self._parents) :]]
        votes = self._validator.votes
        for i, candidate in enumerate(self._voting):
            candidate.replies = replies[i * votes : (i + 1) * votes]
        self._parents, self._voting, self._request_ids = [], [], []

    def outcomes(self) -> list[AugmentOutcome]:
        """What became of questions since the last call."""
        found, self._outcomes = self._outcomes, []
        return found

    def metrics(self) -> dict[str, float]:
        """Counts since the start of the run: requested, accepted, and rejected by reason. `pending` is the length of
        the queue, `acceptance` is accepted / (accepted + rejected).
        """
        counts, accepted = self._counts, self._counts["accepted"]
        rejected = {f"rejected_{reason}": float(counts[reason]) for reason in REASONS}
        concluded = accepted + sum(rejected.values())
        values = {"requested": counts["requested"], "accepted": accepted, **rejected, "pending": len(self._queue)}
        values["acceptance"] = accepted / concluded if concluded else 0.0
        return {f"augment/{name}": float(value) for name, value in values.items()}

    def state_dict(self) -> dict[str, Any]:
        """Everything besides the pool that later steps depend on, ready for JSON, but for requests whose samples are
        not received yet."""
        queue = [asdict(candidate) for candidate in self._queue]
        return {"version": VERSION, "queued": self._queued, "queue": queue, "counts": dict(self._counts)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`, in a new augmenter, and submit the queue to the validator again.

        Raises CheckpointError: another version, or damaged.
        """
        if state.get("version") != VERSION:
            raise CheckpointError(f"version {state.get('version')}, this qarl reads {VERSION}", WHERE, OTHER_VERSION)
        try:
            queue = _QUEUE.validate_python(state["queue"])
            queued = _TEXTS.validate_python(state["queued"])
            counts = Counter(_COUNTS.validate_python(state["counts"]))
            if unknown := {candidate.question for candidate in queue}.difference(queued):
                raise ValueError(f"'{min(unknown)}' is in the queue but not in the list of all queued questions")
        except (KeyError, ValueError) as error:
            raise CheckpointError(f"incomplete or damaged ({' '.join(repr(error).split())})", WHERE, DAMAGED) from error
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
        return self._sampling.request(prompt, seed)

    def _read(self, parent: Prompt, sample: Sample) -> None:
        """Queue the question in the reply, or refuse it."""
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
        self._queue.append(Candidate(question, parent.id, parent.level, parent.source))
        self._validator.submit(question)

    def _check(self, question: str) -> tuple[str, str]:
        """Reason and detail why `question` may not join the queue; empty when it may."""
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


def beginning(question: str) -> str:
    """The first half of `question`, cut at the end of a word if it has several."""
    half = question[: len(question) // 2]
    return half.rpartition(" ")[0] or half

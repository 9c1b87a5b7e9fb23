"""An augmenter on a small pool, for tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from qarl.config.policy import SamplingConfig
from qarl.config.pool import AugmentConfig, PoolConfig
from qarl.config.task import DatasetTaskConfig, SortingTaskConfig
from qarl.prompts.augment import Augmenter
from qarl.prompts.pool import Pool
from qarl.prompts.validate import ProgramCheck, Validator, Verdict
from qarl.tasks import make_task, sorting
from qarl.tasks.dataset import DatasetTask
from qarl.tasks.task import Task
from qarl.types import AugmentOutcome, GroupResult, Sample, SampleRequest

SORTING = AugmentConfig(per_step=4, template="{question}={beginning}", pattern="^([0-9]+)$")
STORY = "Anna has seven red apples and gives three of them to her brother Ben. How many apples has she left?"


def encode(text: str) -> list[int]:
    return [ord(char) for char in text]


class Listed(DatasetTask):
    """Problems of rows, with these held-out questions."""

    def __init__(self, heldout: Sequence[str]) -> None:
        template = "Solve: {question}"
        super().__init__(DatasetTaskConfig(train_path="t", heldout_path="h", prompt_template=template), encode)
        self._listed = heldout

    def heldout_questions(self) -> Sequence[str]:
        return self._listed


class Slow:
    """A validator that knows what it is told, when it is told."""

    votes = 0

    def __init__(self) -> None:
        self.submitted: list[str] = []
        self.known: dict[str, Verdict] = {}

    def submit(self, question: str) -> None:
        self.submitted.append(question)

    def verdict(self, question: str, replies: Sequence[str]) -> Verdict | None:
        return self.known.get(question)

    def close(self) -> None:
        pass


def reply(request: SampleRequest, text: str, finish_reason: str = "stop") -> Sample:
    return Sample(request.prompt, (1,), np.zeros(1, np.float32), text, finish_reason, version=0)


class Case:
    """A pool whose prompts were all measured at its target, and an augmenter on it."""

    def __init__(
        self,
        problems: Task,
        questions: Sequence[str],
        config: AugmentConfig,
        validator: Validator | None = None,
        pool: PoolConfig | None = None,
        heldout: Sequence[str] = (),
        longest: int = 999,
    ) -> None:
        self.prompts = [problems.prompt(question, "answer", 3) for question in questions]
        self.pool = Pool(self.prompts, pool or PoolConfig(cooldown_steps=0), seed=0)
        self.pool.observe([GroupResult(p.id, (0.0, 1.0)) for p in self.pool.draw(len(questions), 0)], 0)
        held = [problems.prompt(question, "", 0) for question in heldout]
        validator = validator or ProgramCheck(sorting.solve)
        args = (
            self.pool,
            problems,
            validator,
            self.prompts,
            held,
            SamplingConfig(temperature=0.7, max_new_tokens=9),
            longest,
            5,
        )
        self.augmenter = Augmenter(config, *args)

    def ask(self, step: int = 1) -> list[SampleRequest]:
        return self.augmenter.requests(self.prompts, step)

    def read(self, *texts: str, finish_reason: str = "stop") -> list[AugmentOutcome]:
        """Outcomes when the policy answers the requests of a new step with `texts`."""
        requests = self.ask()
        assert len(requests) >= len(texts)
        samples = [reply(request, text, finish_reason) for request, text in zip(requests, texts, strict=False)]
        self.augmenter.receive(samples)
        return self.augmenter.outcomes()

    def metrics(self) -> dict[str, float]:
        """Those that are not zero, without their prefix."""
        return {name.removeprefix("augment/"): value for name, value in self.augmenter.metrics().items() if value}


def sorting_case(*questions: str, **settings: Any) -> Case:
    problems = make_task(SortingTaskConfig(levels=[2, 4, 6]), encode)
    return Case(problems, questions, settings.pop("config", SORTING), **settings)


def story_case(validator: Validator | None = None, **settings: Any) -> Case:
    config = AugmentConfig(per_step=4, ngram=4, **settings.pop("config", {}))
    return Case(Listed(settings.pop("listed", ())), [STORY], config, validator or Slow(), **settings)


def tagged(question: str) -> str:
    return f"Sure. <problem>{question}</problem>"

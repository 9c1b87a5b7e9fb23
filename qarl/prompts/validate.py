"""Who finds the answer of a new problem, or refuses it. Nobody here is ever waited for."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from qarl.config.pool import VoteConfig


@dataclass(frozen=True)
class Verdict:
    """The answer of a sound problem; or none, and why."""

    answer: str | None
    reason: str = ""


class Validator(Protocol):
    """Judges questions; those that wait are told apart by their text."""

    votes: int
    """Answers of the policy that it wants with each question."""

    def submit(self, question: str) -> None:
        """A question has joined the queue, or was in it when the run was resumed."""
        ...

    def verdict(self, question: str, replies: Sequence[str]) -> Verdict | None:
        """None while it is not known, or `replies`, of which `votes` are wanted, are not there yet."""
        ...

    def close(self) -> None: ...


class ProgramCheck:
    """A program of the task, `solve`, knows the answer of every well-formed question."""

    votes = 0

    def __init__(self, solve: Callable[[str], str]) -> None:
        self._solve = solve

    def submit(self, question: str) -> None:
        pass

    def verdict(self, question: str, replies: Sequence[str]) -> Verdict:
        return Verdict(self._solve(question))

    def close(self) -> None:
        pass


class SelfConsistency:
    """The answer that most of the policy's replies give (arXiv 2203.11171), when enough of them do."""

    def __init__(self, config: VoteConfig) -> None:
        self.votes = config.num_samples
        self._config = config

    def submit(self, question: str) -> None:
        pass

    def verdict(self, question: str, replies: Sequence[str]) -> Verdict | None:
        if not replies:
            return None
        answers = [answer for reply in replies if (answer := last_answer(reply, self._config.answer_pattern))]
        if not answers:
            return Verdict(None, "no reply has an answer")
        answer, count = Counter(answers).most_common(1)[0]  # the first met, when two are as frequent
        if count < self._config.threshold * len(replies):
            return Verdict(None, f"the most frequent answer has {count} of {len(replies)} votes")
        return Verdict(answer)

    def close(self) -> None:
        pass


def last_answer(text: str, pattern: str) -> str:
    """The group of the last match of `pattern` in `text`, stripped; empty when there is none."""
    found = re.findall(pattern, text, re.DOTALL)
    return str(found[-1]).strip() if found else ""

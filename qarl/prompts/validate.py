"""Validators find the answer of a new problem, or refuse the problem. All calls are non-blocking."""

import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from qarl.config.pool import VoteConfig


@dataclass(frozen=True)
class Verdict:
    """The answer of a valid problem; or None, and the reason."""

    answer: str | None
    reason: str = ""


class Validator(ABC):
    """Judges questions. A question is identified by its text."""

    votes = 0
    """How many answers by the policy it needs for each question."""

    def submit(self, question: str) -> None:  # noqa: B027
        """Begin to judge a question that has joined the queue, or was in it when the run was resumed."""

    @abstractmethod
    def verdict(self, question: str, replies: Sequence[str]) -> Verdict | None:
        """None while it is not available. `replies` are the policy's `votes` answers, or empty until they arrive."""

    def close(self) -> None:  # noqa: B027
        """End what runs in the background."""


class ProgramCheck(Validator):
    """The task's program `solve` computes the answer of every well-formed question."""

    def __init__(self, solve: Callable[[str], str]) -> None:
        self._solve = solve

    def verdict(self, question: str, replies: Sequence[str]) -> Verdict:
        return Verdict(self._solve(question))


class SelfConsistency(Validator):
    """The most frequent answer of the policy's replies (arXiv 2203.11171), if enough replies give it."""

    def __init__(self, config: VoteConfig) -> None:
        self.votes = config.num_samples
        self._config = config

    def verdict(self, question: str, replies: Sequence[str]) -> Verdict | None:
        if not replies:
            return None
        answers = [answer for reply in replies if (answer := last_answer(reply, self._config.answer_pattern))]
        if not answers:
            return Verdict(None, "no reply has an answer")
        answer, count = Counter(answers).most_common(1)[0]  # on a tie the first
        if count < self._config.threshold * len(replies):
            return Verdict(None, f"the most frequent answer has {count} of {len(replies)} votes")
        return Verdict(answer)


def last_answer(text: str, pattern: str) -> str:
    """The group of the last match of `pattern` in `text`, stripped; empty when there is none."""
    found = re.findall(pattern, text, re.DOTALL)
    return str(found[-1]).strip() if found else ""

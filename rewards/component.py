"""What every kind of reward sees and provides. A new kind is one function or class here in `rewards`, one line in the
table of `rewards/kinds.py`, and its settings in `qarl/config/reward.py`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Response:
    """One response and the row that it answers.

    `token_ids` are the tokens that the policy sampled, `finish_reason` is "stop" or "length" (cut off). `answers` are
    all right answers, `answer` first; `metadata` are the other fields; `row` is what its verifier takes besides these.
    """

    prompt_id: str
    prompt: str
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    answers: tuple[str, ...]
    source: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    row: Mapping[str, Any] = field(default_factory=dict)

    @property
    def answer(self) -> str:
        return self.answers[0]


class Component:
    """One part of a reward, in a verifier process. What a method raises costs only the responses that it judges."""

    def start(self) -> None:
        """Runs once in each process, before any time-out: imports, connections. May raise what makes it impossible."""

    def check(self, response: Response) -> None:
        """Raises ValueError when no response could be judged by the answer of this row. `response` has no text."""

    def judge(self, responses: Sequence[Response]) -> Sequence[float | BaseException]:
        """One finite reward a response, or what was raised; as many at once as its config's `at_once` says."""
        raise NotImplementedError


class Rule(Component):
    """A reward that is a function of one response."""

    def __init__(self, rule: Callable[..., float], settings: Mapping[str, Any]) -> None:
        self._rule, self._settings = rule, settings

    def judge(self, responses: Sequence[Response]) -> Sequence[float]:
        return [self._rule(response, **self._settings) for response in responses]

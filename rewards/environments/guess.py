"""A game: the policy guesses a number, and is told whether it is higher or lower."""

from __future__ import annotations

import re
from typing import Any


class Guess:
    """The number is the prompt's answer. The game ends with the right guess, or after `guesses` of them.

    Args:
        guesses: how many the policy has.
        below: where it is not 0, the number is the answer modulo this.
        opening: what the policy reads in place of the task's prompt, which may give the number away.
        higher, lower, unread: what is given after a wrong guess, and after a response without a number.
    """

    def __init__(
        self,
        guesses: int = 4,
        below: int = 0,
        opening: str | None = None,
        higher: str = "higher",
        lower: str = "lower",
        unread: str = "no number",
    ) -> None:
        self._below, self._opening = below, opening
        self._left, self._higher, self._lower, self._unread = guesses, higher, lower, unread
        self._number = 0

    def reset(self, prompt: dict[str, Any]) -> str | None:
        number = int(prompt["answer"])
        self._number = number % self._below if self._below else number
        return self._opening

    def step(self, response: str) -> tuple[str | None, float, bool]:
        self._left -= 1
        numbers = re.findall(r"\d+", response)
        guess = int(numbers[-1][:18]) if numbers else None
        if guess == self._number:
            return None, 1.0, True
        if self._left == 0:
            return None, 0.0, True
        if guess is None:
            return self._unread, 0.0, False
        return self._higher if guess < self._number else self._lower, 0.0, False

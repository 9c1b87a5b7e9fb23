"""Products of two numbers for the calculator environment, with a teacher that now and then calls it."""

import random
from collections.abc import Iterator
from typing import Any

from qarl.tasks.sorting import is_heldout
from qarl.tasks.task import with_mistakes

Row = dict[str, Any]


class Products:
    """A task of `task.kind: custom`: `12*34=` is 408. Held out is one problem in ten, by its checksum.

    Args:
        lowest, highest: of the two numbers.
        num_prompts: training problems.
        calls: share of the demonstrations that call the calculator; the others answer at once.
    """

    answer = staticmethod(with_mistakes)

    def __init__(self, lowest: int, highest: int, num_prompts: int, calls: float) -> None:
        self._lowest, self._highest, self._num_prompts, self._calls = lowest, highest, num_prompts, calls
        self.teacher = self
        self.settings = {"lowest": lowest, "highest": highest, "calls": calls}

    def __call__(self, seed: int) -> tuple[list[Row], list[Row]]:
        rng = random.Random(f"products/{seed}")
        questions = list(dict.fromkeys(self._question(rng) for _ in range(2 * self._num_prompts)))
        rows = [{"question": question, "answer": self.solve(question)} for question in questions]
        heldout = [row for row in rows if is_heldout(row["question"])]
        return [row for row in rows if not is_heldout(row["question"])][: self._num_prompts], heldout

    def solve(self, question: str) -> str:
        first, _, second = question.rstrip("=").partition("*")
        return str(int(first) * int(second))

    def demonstrations(self, n: int, swap_prob: float, rng: random.Random) -> list[tuple[str, str]]:
        """An answer at once, a call, or an answer after a call, each with mistakes; never of a held-out problem."""
        demos: list[tuple[str, str]] = []
        while len(demos) < n:
            question = self._question(rng)
            if not is_heldout(question):
                demos += self._demonstrations(question, swap_prob, rng)
        return demos[:n]

    def _demonstrations(self, question: str, swap_prob: float, rng: random.Random) -> Iterator[tuple[str, str]]:
        answer = self.solve(question)
        if rng.random() >= self._calls:
            yield question, with_mistakes(answer, swap_prob, rng)
            return
        call = f"({question.rstrip('=')})"
        yield question, with_mistakes(call, swap_prob, rng)
        yield f"{question}{call}<eos>{answer}=", with_mistakes(answer, swap_prob, rng)

    def _question(self, rng: random.Random) -> str:
        return f"{rng.randint(self._lowest, self._highest)}*{rng.randint(self._lowest, self._highest)}="

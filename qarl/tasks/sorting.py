"""Sorting digits: `529172=` -> `122579`. The length is the level; a teacher makes mistakes."""

import random
import re
import zlib
from collections.abc import Iterator, Sequence

from qarl.config.task import SortingTaskConfig
from qarl.errors import ConfigError
from qarl.tasks.task import NOTHING, Encode, Log, Task, log_shortage, take_evenly, with_mistakes
from qarl.types import Prompt


class SortingTask(Task):
    """Digits to be sorted."""

    def __init__(self, config: SortingTaskConfig, encode: Encode, special: re.Pattern[str] = NOTHING) -> None:
        super().__init__(encode)
        self._config, self._lengths = config, range(min(config.levels), max(config.levels) + 1)
        self.solve, self.teacher = solve, SortingTeacher(config.levels)

    def load(self, seed: int, num_heldout: int, log: Log) -> tuple[list[Prompt], list[Prompt]]:
        splits = []
        for split, n in (("training", self._config.num_prompts), ("held-out", num_heldout)):
            found = generate(self._config.levels, n, seed, heldout=split == "held-out")
            if not found:
                what = f"levels {self._config.levels} have no {split} problem"
                raise ConfigError(what, "task.levels", "add a longer level")
            log_shortage(split, len(found), n, log)
            splits.append([self.prompt(digits, solve(digits)) for digits in found])
        return splits[0], splits[1]

    def prompt(self, question: str, answer: str, level: int = 0) -> Prompt:
        """The level is the number of digits; `level` is ignored."""
        text = f"{question}="
        return Prompt(f"sorting/{question}", text, answer, tuple(self.encode(text)), len(question))

    def question(self, prompt: Prompt) -> str:
        return prompt.text.removesuffix("=")

    def is_well_formed(self, question: str) -> bool:
        """Digits, as many as the shortest level has, or the longest, or any number between."""
        return re.fullmatch("[0-9]+", question) is not None and len(question) in self._lengths

    def is_heldout(self, question: str) -> bool:
        return is_heldout(solve(question))


class SortingTeacher:
    """Sorts digits, with occasional mistakes."""

    answer = staticmethod(with_mistakes)

    def __init__(self, levels: Sequence[int]) -> None:
        self.settings = {"levels": list(levels)}

    def demonstrations(self, n: int, swap_prob: float, rng: random.Random) -> list[tuple[str, str]]:
        """`n` fresh pairs of prompt text and answer, level uniform, never of a held-out answer."""
        demos: list[tuple[str, str]] = []
        while len(demos) < n:
            digits = random_digits(rng.choice(self.settings["levels"]), rng)
            right = solve(digits)
            if not is_heldout(right):
                demos.append((f"{digits}=", self.answer(right, swap_prob, rng)))
        return demos


def solve(digits: str) -> str:
    """The answer: the digits in ascending order."""
    return "".join(sorted(digits))


def is_heldout(answer: str) -> bool:
    """Whether problems with this answer (sorted digits) are for evaluation only: one multiset in ten."""
    return zlib.crc32(answer.encode()) % 10 == 0


def random_digits(level: int, rng: random.Random) -> str:
    """`level` uniform digits."""
    return f"{rng.randrange(10**level):0{level}d}"


def generate(levels: Sequence[int], n: int, seed: int, heldout: bool) -> list[str]:
    """Up to `n` distinct problems, held-out or training ones, as digits without the `=`.

    The levels take turns, so every prefix is spread evenly over them. When a level has no more problems (level 2 has
    100 in all), the others continue.
    """
    return take_evenly([_problems(level, seed, heldout) for level in levels], n)


def _problems(level: int, seed: int, heldout: bool) -> Iterator[str]:
    """Every problem of one level and split, once, in an order given by `seed`."""
    rng = random.Random(f"sorting/{seed}/{level}/{heldout}")
    seen: set[str] = set()
    while len(seen) < 10**level:
        digits = random_digits(level, rng)
        if digits not in seen:
            seen.add(digits)
            if is_heldout(solve(digits)) == heldout:
                yield digits

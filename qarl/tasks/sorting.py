"""Sorting digits: `529172=` -> `122579`. Graded by length, split on the answer, with a teacher that makes slips."""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TypeVar

from qarl.errors import ConfigError

T = TypeVar("T")


def solve(digits: str) -> str:
    """The answer: the digits in ascending order."""
    return "".join(sorted(digits))


def is_heldout(answer: str) -> bool:
    """Whether problems with this answer (sorted digits) are for evaluation only: one multiset in ten."""
    return zlib.crc32(answer.encode()) % 10 == 0


def teacher(answer: str, rng: random.Random, swap_prob: float) -> str:
    """A sloppy demonstration: scanning from the left, each neighbouring pair is swapped with `swap_prob`."""
    digits = list(answer)
    for i in range(len(digits) - 1):
        if rng.random() < swap_prob:
            digits[i], digits[i + 1] = digits[i + 1], digits[i]
    return "".join(digits)


def random_digits(level: int, rng: random.Random) -> str:
    """`level` uniform digits."""
    return f"{rng.randrange(10**level):0{level}d}"


def generate(levels: Sequence[int], n: int, seed: int, heldout: bool) -> list[str]:
    """Up to `n` distinct problems, held-out or training ones, as digits without the `=`.

    The levels take turns, so every prefix is spread evenly over them; a level that has no more problems (level 2 has
    100 in all) leaves its turns to the others.

    Raises:
        ConfigError: `levels` is empty, holds a number below 1, or repeats one.
    """
    check_levels(levels)
    return take_evenly([_problems(level, seed, heldout) for level in levels], n)


def check_levels(levels: Sequence[int]) -> None:
    """Raises ConfigError unless `levels` are distinct positive numbers of digits."""
    if not levels or min(levels) < 1 or len(set(levels)) < len(levels):
        raise ConfigError(f"levels {list(levels)} are not distinct positive numbers of digits", where="task.levels")


def take_evenly(streams: Iterable[Iterator[T]], n: int) -> list[T]:
    """Up to `n` items, one from each stream in turn; streams that end drop out."""
    return list(islice(_in_turn(list(streams)), n))


def _in_turn(streams: list[Iterator[T]]) -> Iterator[T]:
    while streams:
        alive = []
        for stream in streams:
            for item in islice(stream, 1):  # none when the stream has ended
                alive.append(stream)
                yield item
        streams = alive


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

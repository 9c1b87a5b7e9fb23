"""Texts that say the same: equal up to case, white space and Unicode forms, or alike in their n-grams of words."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable

WORD = re.compile(r"\w+|[^\w\s]")


def words(text: str) -> tuple[str, ...]:
    """Words and single signs of `text` in NFKC form without case: "Is 2+2 = 4?" -> is 2 + 2 = 4 ?"""
    return tuple(WORD.findall(unicodedata.normalize("NFKC", text).casefold()))


class TextIndex:
    """Texts that can be asked for the one nearest to another. A text shorter than `n` words is a single n-gram.

    Adding and asking cost O(words), times the texts that share an n-gram; about 200 bytes are held for each n-gram.
    """

    def __init__(self, n: int, texts: Iterable[str] = ()) -> None:
        self._n = n
        self._holders: dict[int, list[int]] = {}  # hash of an n-gram -> the texts that have it
        self._sizes: list[int] = []  # distinct n-grams of each text
        for text in texts:
            self.add(text)

    def __len__(self) -> int:
        return len(self._sizes)

    def add(self, text: str) -> None:
        grams = self._grams(text)
        for gram in grams:
            self._holders.setdefault(gram, []).append(len(self._sizes))
        self._sizes.append(len(grams))

    def overlap(self, text: str) -> float:
        """Largest |A and B| / min(|A|, |B|) of the n-grams of `text` and of a text in the index, in [0, 1].

        1 for equal texts, and for one that holds the other whole.
        """
        grams = self._grams(text)
        shared = Counter(holder for gram in grams for holder in self._holders.get(gram, ()))
        return max((count / min(len(grams), self._sizes[i]) for i, count in shared.items()), default=0.0)

    def _grams(self, text: str) -> set[int]:
        found, n = words(text), self._n
        return {hash(found[i : i + n]) for i in range(max(1, len(found) - n + 1))}

"""Finding equal texts: equal up to case, white space and typography, or with common n-grams of words."""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence

WORD = re.compile(r"\w+|[^\w\s]")
UNSEEN = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e"
    "\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff\uffa0\U000e0000-\U000e0fff]"
)
"""Characters that are invisible (Unicode's Default_Ignorable_Code_Point)."""
PLAIN = str.maketrans(
    dict.fromkeys("\u2018\u2019\u201a\u201b\u2032\u02bc", "'")
    | dict.fromkeys("\u201c\u201d\u201e\u201f\u00ab\u00bb", '"')
    | dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2015\u2212", "-")
    | dict.fromkeys("\u00d7\u22c5\u00b7\u2219", "*")
    | dict.fromkeys("\u00f7\u2044\u2215", "/")
)
"""Quotes, dashes and arithmetic signs, with the keyboard's character for each: a policy writes both."""


def words(text: str) -> tuple[str, ...]:
    """Words and single signs of `text` in NFKC form, without case and typography: "Is 2+2 = 4?" -> is 2 + 2 = 4 ?"""
    return tuple(WORD.findall(plain(text)))


def plain(text: str) -> str:
    """`text` in NFKC form, without case and typography."""
    if text.isascii():  # has none of it, and most texts are: 20 times faster
        return text.casefold()
    return UNSEEN.sub("", unicodedata.normalize("NFKC", text)).translate(PLAIN).casefold()


class TextIndex:
    """Texts, and the largest overlap of another text with one of them. A text of fewer than `n` words is one n-gram:
    it overlaps with an equal text only.

    `add` and `overlap` cost O(words), times the texts that share an n-gram. An n-gram takes about 200 bytes.
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

        1 for equal texts, and for two of `n` words or more of which one holds the other whole.
        """
        grams = self._grams(text)
        shared = Counter(holder for gram in grams for holder in self._holders.get(gram, ()))
        return max((count / min(len(grams), self._sizes[i]) for i, count in shared.items()), default=0.0)

    def _grams(self, text: str) -> set[int]:
        found, n = words(text), self._n
        return {hash(found[i : i + n]) for i in range(max(1, len(found) - n + 1))}


class HeldoutIndex(TextIndex):
    """As `TextIndex`, but when one text contains the other, they overlap by 1, however short they are: a
    held-out question with a few more or fewer words around it is still held out.

    `overlap` costs O(all texts) for a text shorter than `n` words, and O(the texts shorter than `n` words) for others.
    """

    def __init__(self, n: int, texts: Iterable[str] = ()) -> None:
        self._lines: list[str] = []
        self._short_lines: list[str] = []
        super().__init__(n, texts)

    def add(self, text: str) -> None:
        super().add(text)
        found = words(text)
        self._lines.append(_line(found))
        if len(found) < self._n:
            self._short_lines.append(self._lines[-1])

    def overlap(self, text: str) -> float:
        found = words(text)
        line = _line(found)
        if any(short in line for short in self._short_lines):
            return 1.0
        if len(found) < self._n and any(line in other for other in self._lines):
            return 1.0
        return super().overlap(text)


def _line(found: Sequence[str]) -> str:
    """Words, each between spaces."""
    return f" {' '.join(found)} "

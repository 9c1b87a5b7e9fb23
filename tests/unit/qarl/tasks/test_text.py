"""The text index against comparing with every text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qarl.tasks.text import HeldoutIndex, TextIndex, words

TEXTS = st.lists(st.sampled_from("abc"), max_size=9).map(" ".join)


def overlap(n: int, first: str, second: str) -> float:
    def grams(text: str) -> set[tuple[str, ...]]:
        found = tuple(text.split())
        return {found[i : i + n] for i in range(len(found) - n + 1)} or {found}

    a, b = grams(first), grams(second)
    return len(a & b) / min(len(a), len(b))


@given(st.integers(1, 4), st.lists(TEXTS, max_size=5), TEXTS)
def test_overlap_is_that_with_the_nearest_text(n: int, texts: list[str], text: str) -> None:
    index = TextIndex(n, texts)
    assert len(index) == len(texts)
    assert index.overlap(text) == max((overlap(n, text, other) for other in texts), default=0.0)


def test_words_are_compared_without_case_space_and_unicode_form() -> None:
    assert words("Is  2+2 =\n4?") == ("is", "2", "+", "2", "=", "4", "?")
    assert words("ＳＴＲＡẞＥ ﬁn ²") == words("strasse fin 2")
    assert words("2+2") != words("2-2")
    assert TextIndex(8, ["How many  apples?"]).overlap("HOW MANY APPLES ?") == 1.0


@pytest.mark.parametrize(
    ("plain", "typeset"),
    [
        ("Ann's \"x\" isn't 2-2", "Ann\u2019s \u201cx\u201d isn\u2019t 2\u22122"),
        ("a well-known 3*4/5", "a well\u2011known 3\u00d74\u20445"),
        ("seven apples", "se\u00adven\u200b app\u2060les\ufe0f\U000e0041"),
    ],
)
def test_words_are_compared_without_typography(plain: str, typeset: str) -> None:
    assert words(plain) == words(typeset)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("once there were seven birds in a tree and then three flew off", 1.0),
        ("listen: once there were seven birds in a tree and then three flew off, sadly", 1.0),
        ("once there were seven birds in a tree and then nine flew off", 3 / 6),
        ("what is seven less three", 0.0),
    ],
)
def test_near_duplicates(text: str, expected: float) -> None:
    index = TextIndex(8, ["once there were seven birds in a tree and then three flew off", "other"])
    assert index.overlap(text) == pytest.approx(expected)


@given(st.integers(1, 4), st.lists(TEXTS, max_size=5), TEXTS)
def test_of_two_heldout_texts_one_may_hold_the_other(n: int, texts: list[str], text: str) -> None:
    def holds(longer: str, shorter: str) -> bool:
        return bool(shorter) and f" {shorter} " in f" {longer} "

    expected = [1.0 if holds(text, other) or holds(other, text) else overlap(n, text, other) for other in texts]
    assert HeldoutIndex(n, texts).overlap(text) == max(expected, default=0.0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("So tell me: What is 2+2?", 1.0),
        ("what is  17 TIMES 23?", 1.0),
        ("What is 2+3?", 0.0),
        ("What is 12+2?", 0.0),
    ],
)
def test_short_heldout_texts_with_and_without_words_around(text: str, expected: float) -> None:
    index = HeldoutIndex(8, ["What is 2+2?", "Compute exactly in your head: what is 17 times 23?"])
    assert index.overlap(text) == expected

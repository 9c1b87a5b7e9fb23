from __future__ import annotations

import pytest

from rewards.choice import choice, chosen
from tests.support.rewards import response

LETTERS = "ABCDE"


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        *(("B", "B"), ("(B)", "B"), ("B.", "B"), ("The answer is (B).", "B"), ("The answer is B: Paris.", "B")),
        (r"\boxed{B}", "B"),
        (r"\boxed{\text{(B)}}", "B"),
        (r"First \boxed{A}. No, \boxed{B}", "B"),
        ("**Answer: B**", "B"),
        ("A is wrong and C is wrong.\nSo it is (B)", "B"),
        ("(A) is out, so I take (B), a city.", "B"),
        ("The answer is A or B.", None),
        (r"\boxed{A, B}", None),
        (r"(A) is out. \boxed{C, D}", None),
        ("(A) is out. The answer is C or D.", None),
        (r"\boxed{A} \boxed{B}", None),
        ("The answer is not B.", None),
        ("I do not know.", None),
        ("", None),
        ("Because it is", None),
    ],
)
def test_the_chosen_letter(text: str, letter: str | None) -> None:
    assert chosen(text, LETTERS) == letter


@pytest.mark.parametrize("answer", ["B", "(B)", r"\text{(B)}", "B. Paris"])
def test_the_reference_may_be_written_as_an_answer(answer: str) -> None:
    assert choice(response("The answer is (B).", answer), LETTERS) == 1.0
    assert choice(response("The answer is (C).", answer), LETTERS) == 0.0
    assert choice(response("?", answer), LETTERS) == 0.0
    assert choice(response("C", answer, "C"), LETTERS) == 1.0

"""The calculator answers calls, and nothing but arithmetic."""

from __future__ import annotations

import pytest

from rewards.environments.calculator import Calculator, evaluate


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("12 * 34", "408"),
        ("(1 + 2) * -3", "-9"),
        ("7 / 2", "3.5"),
        ("1 / 3", "0.3333333333"),
        ("2 ** 9", "error: only numbers, + - * / // % and brackets"),
        ("__import__('os')", "error: only numbers, + - * / // % and brackets"),
        ("1 / 0", "error: division by zero"),
        ("1 +", "error: invalid syntax (<unknown>, line 1)"),
        ("1 + " * 100 + "1", "error: more than 200 characters"),
    ],
)
def test_values(text: str, value: str) -> None:
    assert evaluate(text) == value


def test_a_call_is_answered_and_the_last_response_is_judged() -> None:
    calculator = Calculator(value="= {value}")
    calculator.reset({"answer": "408"})
    assert calculator.step("I compute <calc>12 * 34</calc>") == ("= 408", 0.0, False)
    assert calculator.step("<calc>1</calc> <calc>408 - 1</calc>") == ("= 407", 0.0, False)
    assert calculator.step(" 408\n") == (None, 1.0, True)
    calculator.reset({"answer": "5"})
    assert calculator.step("408") == (None, 0.0, True)

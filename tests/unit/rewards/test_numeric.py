from __future__ import annotations

import pytest

from rewards.numeric import Numeric
from tests.support.rewards import response


@pytest.mark.parametrize(
    ("text", "answer", "absolute", "relative", "reward"),
    [
        ("about 3.14", "3.14159", 0.01, 0.0, 1.0),
        ("about 3.1", "3.14159", 0.01, 0.0, 0.0),
        (r"\boxed{101}", "100", 0.0, 0.01, 1.0),
        (r"\boxed{102}", "100", 0.0, 0.01, 0.0),
        (r"\boxed{102}", "100", 2.0, 0.01, 1.0),
        (r"\boxed{1.6e-19}", r"9.1 \times 10^{-31}", 0.0, 0.01, 0.0),
        (r"\boxed{x = 5.1}", "5", 0.2, 0.0, 1.0),
        (r"\boxed{10 kg}", "10 cm", 1.0, 0.0, 0.0),
        (r"\boxed{\sqrt{2}}", "1.41", 1.0, 0.0, 0.0),
        ("no idea", "5", 9.0, 0.0, 0.0),
    ],
)
def test_within_a_tolerance(text: str, answer: str, absolute: float, relative: float, reward: float) -> None:
    assert Numeric(absolute, relative).judge([response(text, answer)]) == [reward]


def test_a_reference_that_is_no_number_is_refused() -> None:
    with pytest.raises(ValueError, match="is no number"):
        Numeric(0.1, 0.0).check(response("", "x + 1"))

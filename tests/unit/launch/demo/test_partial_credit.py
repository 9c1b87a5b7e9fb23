"""Credit for how an answer begins."""

import pytest

from launch.demo.partial_credit import right_beginning


@pytest.mark.parametrize(
    ("text", "finish_reason", "reward"),
    [("123", "stop", 1.0), ("123", "length", 0.75), ("1234", "stop", 0.75), ("129", "stop", 0.5), ("", "stop", 0.0)],
)
def test_only_the_whole_answer_earns_it_all(text: str, finish_reason: str, reward: float) -> None:
    assert right_beginning(text, finish_reason, "123") == reward

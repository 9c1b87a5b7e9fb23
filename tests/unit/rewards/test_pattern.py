from __future__ import annotations

import pytest

from rewards.pattern import has_format, matches
from tests.support.rewards import response


def test_a_regular_expression_matches_a_part_or_the_whole() -> None:
    assert matches(response("a\nb"), "a.b", whole=True) == 1.0
    assert matches(response("a\nbc"), "a.b", whole=True) == 0.0
    assert matches(response("a\nbc"), "a.b", whole=False) == 1.0


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("<think>why</think><answer>5</answer>", 1.0),
        (" <think>\nwhy\n</think>\n\n<answer>5</answer>\n", 1.0),
        ("<think></think><answer></answer>", 1.0),
        ("<answer>5</answer><think>why</think>", 0.0),
        ("<think>why</think>5<answer>5</answer>", 0.0),
        ("<think>why</think><answer>5</answer> Done.", 0.0),
        ("<think>why</think><answer>5", 0.0),
        ("<think>a</think><think>b</think><answer>5</answer>", 0.0),
        ("5", 0.0),
    ],
)
def test_tags(text: str, reward: float) -> None:
    assert has_format(response(text), ["think", "answer"], opened=False, rest=False) == reward


def test_a_prompt_may_open_the_first_tag_and_text_may_follow_the_last() -> None:
    text = "why</think> It is 5."
    assert has_format(response(text), ["think"], opened=True, rest=True) == 1.0
    assert has_format(response(text), ["think"], opened=True, rest=False) == 0.0
    assert has_format(response(text), ["think"], opened=False, rest=True) == 0.0

"""Estimates of an evaluation: against counting, and intervals that cover."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.tools.evaluation import statistics
from launch.tools.evaluation.statistics import compare, estimate, majority_at_k, pass_at_k


@given(st.lists(st.booleans(), min_size=1, max_size=9), st.data())
def test_pass_at_k_is_the_mean_over_all_choices(right: list[bool], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(right)))
    counted = np.mean([any(chosen) for chosen in combinations(right, k)])
    assert pass_at_k(len(right), sum(right), k) == pytest.approx(counted)


@pytest.mark.parametrize("k", [0, 4])
def test_k_lies_within_the_samples(k: int) -> None:
    with pytest.raises(ValueError, match=f"pass@{k} of 3 samples"):
        pass_at_k(3, 1, k)


@pytest.mark.parametrize(
    ("answers", "right", "expected"),
    [
        ("a a b", [1, 1, 0], 1.0),
        ("a b b", [1, 0, 0], 0.0),
        ("a b c", [1, 0, 0], 1 / 3),  # a tie of three
        ("a z b b", [1, 1, 0, 0], 0.5),  # two ways to write the right answer are one
        ("a - - -", [1, 0, 0, 0], 1.0),  # who has no answer does not vote
        ("- - -", [0, 0, 0], 0.0),
    ],
)
def test_a_vote_of_all_samples(answers: str, right: list[int], expected: float) -> None:
    votes = [answer.strip("-") for answer in answers.split()]
    assert majority_at_k(votes, [bool(r) for r in right], len(votes)) == pytest.approx(expected)


def test_a_vote_of_one_is_pass_at_1_and_a_larger_one_counts_all_choices() -> None:
    answers, right = ["a", "a", "a", "b", "b", "c"], [True, True, True, False, False, False]
    assert majority_at_k(answers, right, 1) == pytest.approx(0.5, abs=0.1)
    expected = np.mean([_voted([answers[i] for i in chosen]) for chosen in combinations(range(6), 3)])
    assert majority_at_k(answers, right, 3) == pytest.approx(expected, abs=0.1)


def _voted(votes: list[str]) -> float:
    most = max(map(votes.count, votes))
    first = {vote for vote in votes if votes.count(vote) == most}
    return ("a" in first) / len(first)


def test_intervals_cover_the_truth(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of unlike difficulty, four samples each: 19 of 20 intervals should hold the true mean."""
    monkeypatch.setattr(statistics, "RESAMPLES", 500)
    rng, covered = np.random.default_rng(0), 0
    for trial in range(300):
        chance_P = rng.beta(0.5, 1.0, 100)
        found = estimate(rng.binomial(4, chance_P) / 4, seed=trial)
        covered += found.low <= 1 / 3 <= found.high
    assert 0.91 < covered / 300 < 0.99


def test_equal_values_have_no_width() -> None:
    assert estimate(np.ones(5)) == (1.0, 1.0, 1.0)


def test_a_difference_counts_on_the_same_prompts() -> None:
    rng = np.random.default_rng(0)
    easy_P = rng.uniform(size=200)  # unlike prompts, and a small shift of each
    found = compare(easy_P, easy_P + rng.normal(0.02, 0.05, 200))
    assert found.low < 0.02 < found.high
    assert found.low > 0
    assert found.p < 0.01
    assert compare(easy_P, easy_P) == (0.0, 0.0, 0.0, 1.0)


def test_no_difference_is_rarely_significant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "RESAMPLES", 300)
    rng = np.random.default_rng(1)
    small = [compare(*rng.binomial(4, 0.5, (2, 60)) / 4, seed=trial).p < 0.05 for trial in range(200)]
    assert 0.01 < np.mean(small) < 0.1

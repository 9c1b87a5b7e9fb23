"""Group sizes against every possible sharing out."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qarl.prompts.allocation import allocate


def shares(n: int, budget: int, least: int, most: int) -> Iterator[tuple[int, ...]]:
    if n == 0:
        if budget == 0:
            yield ()
        return
    for first in range(least, min(most, budget) + 1):
        yield from ((first, *rest) for rest in shares(n - 1, budget - first, least, most))


@given(st.lists(st.sampled_from([0.0, 0.1, 0.26, 0.4, 0.5]), min_size=1, max_size=4), st.data())
def test_no_other_sizes_have_a_smaller_variance(spread: list[float], data: st.DataObject) -> None:
    least = data.draw(st.integers(1, 3))
    most = data.draw(st.integers(least, 6))
    budget = data.draw(st.integers(least * len(spread), most * len(spread)))

    def variance(sizes: tuple[int, ...] | list[int]) -> float:
        return sum(s * s / n for s, n in zip(spread, sizes, strict=True))

    sizes = allocate(spread, budget, least, most)
    assert sum(sizes) == budget
    assert all(least <= size <= most for size in sizes)
    best = min(map(variance, shares(len(spread), budget, least, most)))
    assert variance(sizes) == pytest.approx(best)


def test_a_share_by_hand() -> None:
    # Without bounds in the way, sizes are as the standard deviations: 12 : 12 : 4 : 4.
    assert allocate([0.3, 0.3, 0.1, 0.1], 32, 2, 16) == [12, 12, 4, 4]
    assert allocate([0.3, 0.3, 0.1, 0.1], 32, 6, 10) == [10, 10, 6, 6]
    assert allocate([], 0, 4, 16) == []


@pytest.mark.parametrize("spread", [0.0, 0.5])
def test_equal_prompts_get_equal_groups(spread: float) -> None:
    assert allocate([spread] * 5, 40, 4, 16) == [8] * 5

from __future__ import annotations

import pytest

from rewards.length import length, overlong
from tests.support.rewards import response


@pytest.mark.parametrize(("tokens", "reward"), [(1, 0.0), (2, 1.0), (4, 1.0), (5, 0.0)])
def test_length_within_bounds(tokens: int, reward: float) -> None:
    assert length(response("", token_ids=(7,) * tokens), shortest=2, longest=4) == reward
    assert length(response("", token_ids=(7,) * tokens), shortest=2, longest=None) == float(tokens >= 2)


@pytest.mark.parametrize(("tokens", "reward"), [(0, 0.0), (80, 0.0), (81, -0.05), (90, -0.5), (100, -1.0), (110, -1.0)])
def test_overlong_is_dapos_equation_13(tokens: int, reward: float) -> None:
    """0 up to limit - cache; ((limit - cache) - length) / cache up to limit; then -1."""
    assert overlong(response("", token_ids=(7,) * tokens), limit=100, cache=20) == pytest.approx(reward)

from __future__ import annotations

import pytest

from rewards.repetition import repetition
from tests.support.rewards import response


@pytest.mark.parametrize(
    ("ids", "reward"),
    [((), 0.0), ((1,), 0.0), ((1, 2, 3), 0.0), ((1, 1, 1, 1), -2 / 3), ((1, 2, 1, 2, 1), -0.5)],
)
def test_share_of_repeated_bigrams(ids: tuple[int, ...], reward: float) -> None:
    assert repetition(response("", token_ids=ids), n=2) == pytest.approx(reward)

"""Some broken inputs of every area, in the suite; `python -m tests.campaign` runs all of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.campaign.__main__ import areas, cases_of
from tests.campaign.harness import Case, answer, site

EVERY = 37
"""One case of so many is taken."""


@pytest.fixture(scope="module")
def good() -> Iterator[Path]:
    with site() as folder:
        yield folder


@pytest.mark.parametrize(
    "case", [case for area in areas() for case in cases_of(area)[::EVERY]], ids=lambda case: case.name[:60]
)
def test_a_broken_input_is_answered_right(case: Case, good: Path) -> None:
    found = answer(case, good)
    assert found.verdict == "right", str(found)

"""What a test needs besides the packages."""

from __future__ import annotations

import os
from typing import NoReturn

import pytest


def lacking(what: str) -> NoReturn:
    """Skip the test; where QARL_TESTS_SKIP_NOTHING is set, as in CI, fail it."""
    if os.environ.get("QARL_TESTS_SKIP_NOTHING"):
        pytest.fail(what)
    pytest.skip(what)

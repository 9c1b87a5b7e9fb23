"""Property tests. Not in `tests/conftest.py`: the GPU tests need no hypothesis."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("qarl", deadline=None)  # a busy machine is no failure
settings.load_profile("qarl")

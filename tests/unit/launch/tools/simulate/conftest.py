"""Commands whose JSON is looked at."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch.cli import main
from qarl.numerics import processor


@pytest.fixture
def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., dict[str, Any]]:
    """Runs `qarl ... --json` in an empty folder, as on a processor with AVX-512; gives its JSON."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(processor, "has_avx512", lambda: True)

    def command(*argv: str) -> dict[str, Any]:
        assert main([*argv, "--json"]) == 0
        return dict(json.loads(capsys.readouterr().out))

    return command

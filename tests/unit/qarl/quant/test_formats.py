"""The table of formats is the only one: it is complete, and no other code compares formats by name."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import get_args

import pytest

from qarl.quant.formats import FORMATS
from qarl.quant.scheme import TRAITS, SchemeName

ROOT = Path(__file__).parents[4]
ALLOWED = {
    "qarl/quant/scheme.py": "the names, their traits and the default",
    "qarl/quant/formats.py": "the table",
    "qarl/config/policy.py": "a default",
    "launch/commands/mismatch.py": "a default",
    "launch/tools/bench/learner.py": "what the benchmark measures",
    "launch/tools/bench/publish.py": "what the benchmark measures",
}
FILES = [file for package in ("qarl", "rollout", "trainer", "launch") for file in (ROOT / package).glob("**/*.py")]


def test_every_scheme_has_its_entries() -> None:
    assert TRAITS.keys() == set(get_args(SchemeName))
    assert FORMATS.keys() == TRAITS.keys() - {"none"}
    assert all(format_.name == name for name, format_ in FORMATS.items())


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_formats_are_named_in_the_table_only(file: Path) -> None:
    nodes = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Constant)]
    found = [f"line {node.lineno}: {node.value}" for node in nodes if node.value in FORMATS]
    assert bool(found) == (file.relative_to(ROOT).as_posix() in ALLOWED), found

from __future__ import annotations

import inspect
from typing import get_args

import pytest

from qarl.config.reward import SETTINGS, ComponentConfig, Kind
from qarl.errors import ConfigError
from rewards.component import Component
from rewards.kinds import KINDS, answer_reader, check_component, make

NEEDED: dict[str, dict[str, object]] = {
    "regex": {"pattern": "x"},
    "overlong": {"limit": 10, "cache": 2},
    "judge": {"base_url": "http://127.0.0.1:9/v1", "model": "m", "template": "{response}"},
    "http": {"url": "http://127.0.0.1:9"},
    "custom": {"function": "json:dumps"},
}
"""Settings that are required."""


@pytest.mark.parametrize("kind", get_args(Kind))
def test_every_kind_has_a_judge_and_settings_that_it_takes(kind: Kind) -> None:
    assert set(KINDS) == set(SETTINGS) == set(get_args(Kind))
    settings = ComponentConfig(kind=kind, settings=NEEDED.get(kind, {})).full_settings().model_dump()
    component = make(kind, settings)
    assert isinstance(component, Component)
    if rule := getattr(component, "_rule", None):
        inspect.signature(rule).bind("response", **settings)


def test_a_key_that_is_not_set_is_told_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_KEY", raising=False)
    part = ComponentConfig(kind="judge", settings={**NEEDED["judge"], "api_key_env": "NO_KEY"})
    with pytest.raises(ConfigError, match="NO_KEY is not set"):
        check_component(part)


def test_a_package_that_is_missing_is_told_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KINDS, "exact", "no_such_package.exact:exact")
    with pytest.raises(ConfigError, match="exact cannot work here: ModuleNotFoundError"):
        check_component(ComponentConfig(kind="exact"))


@pytest.mark.parametrize(
    ("kind", "text", "answer"),
    [
        ("exact", "1 2", "1 2"),
        ("math", r"first \boxed{7}, then \boxed{1 / 2}", "1/2"),
        ("numeric", "The answer is 5 cm", "5cm"),
        ("math", "I do not know that", ""),
        ("choice", "It is (A), so the answer is B.", "B"),
    ],
)
def test_the_answer_that_a_kind_reads(kind: str, text: str, answer: str) -> None:
    read = answer_reader(kind, {})
    assert read is not None
    assert read(text) == answer


def test_kinds_that_read_no_answer() -> None:
    assert not any(answer_reader(kind, {}) for kind in ("length", "judge", "custom"))

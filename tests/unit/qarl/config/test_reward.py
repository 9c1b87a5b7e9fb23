"""The list of components and its short form."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

import pytest

from qarl.config.io import load_config, validate
from qarl.config.reward import Kind, RewardConfig
from qarl.errors import ConfigError

OVERLONG = {"kind": "overlong", "settings": {"limit": 10, "cache": 2}}


def test_the_short_form_is_one_component() -> None:
    assert [part.kind for part in RewardConfig().parts()] == ["exact"]
    (part,) = RewardConfig(kind="custom", function="m:f", kwargs={"a": 1}).parts()
    assert (part.label, part.weight, part.settings) == ("custom", 1.0, {"function": "m:f", "kwargs": {"a": 1}})
    assert list(RewardConfig(kind="custom", function="m:f").functions()) == [("m:f", "reward.function", {}, "sample")]


def test_components_have_names_weights_and_defaults() -> None:
    config = RewardConfig.model_validate(
        {"components": [{"kind": "math"}, {**OVERLONG, "name": "short", "weight": 0.5}]}
    )
    assert [(part.label, part.weight) for part in config.parts()] == [("math", 1.0), ("short", 0.5)]
    assert config.kinds == {"math", "overlong"}
    assert RewardConfig.model_validate(config.model_dump()) == config


@pytest.mark.parametrize(
    ("section", "graded"),
    [
        ({}, False),
        ({"kind": "math"}, False),
        ({"kind": "custom", "function": "m:f"}, True),
        ({"components": [{"kind": "math", "weight": 2.0}]}, True),
        ({"components": [{"kind": "math"}, OVERLONG]}, True),
    ],
)
def test_graded(section: dict[str, Any], graded: bool) -> None:
    assert RewardConfig.model_validate(section).graded == graded


@pytest.mark.parametrize(
    ("part", "at_once"),
    [
        ({"kind": "math"}, 1),
        ({"kind": "http", "settings": {"url": "http://u", "concurrency": 5}}, 5),
        ({"kind": "custom", "settings": {"function": "m:f", "scope": "group"}}, 0),
        ({"kind": "custom", "settings": {"function": "m:f", "scope": "batch", "at_once": 7}}, 7),
        ({"kind": "custom", "settings": {"function": "m:f"}}, 1),
    ],
)
def test_how_many_responses_are_judged_at_once(part: dict[str, Any], at_once: int) -> None:
    assert RewardConfig.model_validate({"components": [part]}).parts()[0].at_once == at_once


@pytest.mark.parametrize(
    ("section", "what"),
    [
        ({"kind": "custom"}, r"reward\.function"),
        ({"function": "m:f"}, r"reward\.function"),
        ({"kind": "math", "kwargs": {"a": 1}}, r"reward\.function"),
        ({"kind": "judge"}, r"reward\.kind: judge has settings that are required"),
        ({"kind": "math", "components": [{"kind": "exact"}]}, r"reward\.kind: it is one component"),
        ({"components": [{"kind": "math"}, {"kind": "math"}]}, "two have the name 'math'"),
        ({"components": [{"kind": "math", "weight": 0.0}]}, "every weight is 0"),
        ({"components": [{"kind": "math"}], "success": "maths"}, "no component has the name 'maths', but math"),
        ({"components": [OVERLONG]}, r"reward\.success: the reward of 'overlong' is at most 0"),
        ({"components": [{"kind": "math", "sources": ["a"]}, OVERLONG]}, "the reward of 'overlong' is at most 0"),
        (
            {"components": [{"kind": "math", "sources": ["a"]}, {"kind": "exact"}], "success": "math"},
            "'math' judges some sources only",
        ),
    ],
)
def test_contradictions(section: dict[str, Any], what: str) -> None:
    with pytest.raises(ValueError, match=what):
        RewardConfig.model_validate(section)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("regex", {"pattern": "("}, "pattern: must be a regular expression (missing ), unterminated subpattern at "),
        ("regex", {}, "pattern: required"),
        ("numeric", {"absolute": "much"}, "absolute: input should be a valid number, not 'much'"),
        ("overlong", {"limit": 1, "cache": 2}, "cache: 2 exceeds limit 1"),
        ("length", {"shortest": 3, "longest": 2}, "longest: 2 is below shortest 3"),
    ],
)
def test_a_fault_in_settings_names_the_component(kind: str, settings: dict[str, Any], message: str) -> None:
    tree: dict[str, Any] = {"model": {"path": "m"}, "task": {"kind": "sorting"}}
    tree["reward"] = {"components": [{"kind": "exact"}, {"kind": kind, "settings": settings}]}
    with pytest.raises(ConfigError, match=re.escape(f"mine.yaml: reward.components.1.settings.{message}")):
        validate(tree, "mine.yaml")


def test_an_unknown_setting_is_told_where_the_known_ones_are() -> None:
    tree: dict[str, Any] = {"model": {"path": "m"}, "task": {"kind": "sorting"}}
    tree["reward"] = {"components": [{"kind": "numeric", "settings": {"absolut": 1.0}}]}
    words = r"unknown key 'reward\.components\.0\.settings\.absolut', docs/rewards\.md has those of each kind"
    with pytest.raises(ConfigError, match=words):
        validate(tree, "mine.yaml")


def test_a_later_penalty_of_the_same_sources_is_no_success() -> None:
    parts = [
        {"kind": "math", "sources": ["a"]},
        {"kind": "exact", "sources": ["b"]},
        {**OVERLONG, "sources": ["a", "b"]},
    ]
    assert len(RewardConfig.model_validate({"components": parts}).parts()) == 3


PAGE = (Path(__file__).parents[4] / "docs" / "rewards.md").read_text()
BLOCKS = re.findall(r"^```yaml\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def test_the_blocks_of_the_page_are_configs_of_every_kind(tmp_path: Path) -> None:
    kinds = set()
    for block in BLOCKS:
        (tmp_path / "mine.yaml").write_text(block)
        kinds |= load_config(tmp_path / "mine.yaml").reward.kinds
    assert kinds == {*get_args(Kind)} - {"reasoning_gym"}  # which needs its task

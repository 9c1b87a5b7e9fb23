"""The section `objective`: of one kind, with a correction of one kind, and with the advantages that its name means."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest

from qarl.config_io import documentation, load_config, to_yaml, validate
from qarl.errors import ConfigError
from qarl.objectives.config import (
    CorrectionConfig,
    GRPOConfig,
    GSPOConfig,
    ObjectiveConfig,
    SequenceTIS,
    TBPOConfig,
    TokenMask,
    TokenTIS,
)
from qarl.objectives.registry import OBJECTIVES

KINDS = get_args(get_args(ObjectiveConfig)[0])
CORRECTIONS = get_args(get_args(CorrectionConfig)[0])
REQUIRED = {"dr_grpo": {"normalizer": 256}}
DOCS = Path(__file__).parents[3] / "docs" / "objectives.md"


def kind_of(model: Any) -> str:
    return str(model.model_fields["kind"].default)


def tree(objective: Any, **sections: Any) -> dict[str, Any]:
    return {"model": {"path": "x"}, "task": {"kind": "sorting"}, "objective": objective, **sections}


def test_a_section_without_kind_is_tbpo() -> None:
    assert validate(tree({"seq_clip_ratio_high": 0.5}), "test").objective == TBPOConfig(seq_clip_ratio_high=0.5)


def test_another_kind_starts_from_its_own_defaults(tmp_path: Path) -> None:
    base, child = tmp_path / "base.yaml", tmp_path / "child.yaml"
    base.write_text("model: {path: x}\ntask: {kind: sorting}\nobjective: {seq_clip_ratio_high: 0.5}\n")
    child.write_text("inherits: base.yaml\nobjective: {kind: gspo, correction: {kind: token_tis, cap: 3.0}}\n")
    assert load_config(child).objective == GSPOConfig(correction=TokenTIS(cap=3.0))
    assert load_config(base, ["objective.kind=grpo"]).objective == GRPOConfig()
    for same in (["objective.kind=tbpo"], ["objective.seq_clip_ratio_low=3e-4"], []):
        assert load_config(base, same).objective == TBPOConfig(seq_clip_ratio_high=0.5)
    mask = load_config(child, ["objective.correction.kind=token_mask"]).objective
    assert mask == GSPOConfig(correction=TokenMask())
    kept = load_config(child, ["objective.seq_clip_ratio_low=0.1"]).objective
    assert kept == GSPOConfig(seq_clip_ratio_low=0.1, correction=TokenTIS(cap=3.0))


def test_every_kind_has_its_function() -> None:
    assert set(OBJECTIVES) == set(KINDS)


@pytest.mark.parametrize("model", KINDS, ids=kind_of)
@pytest.mark.parametrize("correction", [None, *CORRECTIONS], ids=lambda m: kind_of(m) if m else "default")
def test_every_kind_and_correction_round_trips(model: Any, correction: Any, tmp_path: Path) -> None:
    kind = kind_of(model)
    section = {"kind": kind, **REQUIRED.get(kind, {})}
    if correction:
        section["correction"] = {"kind": kind_of(correction)}
    config = validate(tree(section, advantage=dict(model.advantage)), "test")
    assert type(config.objective) is model
    path = tmp_path / "c.yaml"
    path.write_text(to_yaml(config))
    assert load_config(path) == config


@pytest.mark.parametrize("model", [m for m in KINDS if m.advantage], ids=kind_of)
def test_a_name_without_its_advantages_is_a_contradiction(model: Any) -> None:
    kind = kind_of(model)
    wrong = {"estimator": "group_batch", "normalize_by_std": model.advantage["normalize_by_std"]}
    with pytest.raises(ConfigError, match=f"{kind} is defined with advantage.estimator={model.advantage['estimator']}"):
        validate(tree({"kind": kind, **REQUIRED.get(kind, {})}, advantage=wrong), "test")


@pytest.mark.parametrize(
    ("objective", "line"),
    [
        ({"kind": "ppo"}, "'ppo' found using 'kind' does not match any of the expected tags: 'tbpo', 'grpo'"),
        ({"kind": "dr_grpo"}, "objective.normalizer: required"),
        ({"kind": "gspo", "clip_ratio_low": 0.1}, "unknown key 'objective.clip_ratio_low'"),
        ({"correction": {"kind": "token_mask", "cap": 2.0}}, "unknown key 'objective.correction.cap'"),
        ({"correction": {"kind": "token_tis", "cap": 0.5}}, "objective.correction.cap: "),
        ({"correction": {"kind": "token_mask", "low": 2.0}}, "objective.correction: the band 2 to 5 does not hold 1"),
        ({"correction": {}}, "objective.correction: "),
    ],
)
def test_faults_name_the_key_as_the_user_wrote_it(objective: Any, line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(tree(objective), "test")
    assert line in str(caught.value)


def test_an_overlong_cache_longer_than_the_response() -> None:
    with pytest.raises(ConfigError, match=r"advantage\.overlong_cache: 300 exceeds .* 256"):
        validate(tree({}, advantage={"overlong_cache": 300}), "test")


def test_defaults_of_the_corrections() -> None:
    assert SequenceTIS().cap == TBPOConfig().seq_tis_imp_ratio_cap == 2.0
    assert (TokenMask().low, TokenMask().high) == (0.5, 5.0)


def test_keys_are_documented_in_both_places() -> None:
    known = {key for key, _, _ in documentation()}
    text = DOCS.read_text()
    for model in KINDS:
        assert f"`{kind_of(model)}`" in text
        for name in model.model_fields:
            assert f"objective.{name}" in known
            assert f"`{name}`" in text
    for model in CORRECTIONS:
        assert f"`{kind_of(model)}`" in text
        assert {f"objective.correction.{name}" for name in model.model_fields} <= known

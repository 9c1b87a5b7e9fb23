"""The section `objective`: of one kind, with a correction of one kind, and with the advantages that its name means."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest

from qarl.config.io import documentation, load_config, to_yaml, validate
from qarl.config.objective import (
    AdaptiveClip,
    CustomConfig,
    GRPOConfig,
    GSPOConfig,
    ObjectiveConfig,
    SequenceTIS,
    TBPOConfig,
    TokenClipCorrectionConfig,
    TokenMask,
    TokenTIS,
)
from qarl.errors import ConfigError
from qarl.objectives.registry import OBJECTIVES

KINDS = get_args(get_args(ObjectiveConfig)[0])
CORRECTABLE = [model for model in KINDS if model is not CustomConfig]
CORRECTIONS = get_args(get_args(TokenClipCorrectionConfig)[0])
REQUIRED: dict[str, dict[str, object]] = {"dr_grpo": {"normalizer": 256}, "custom": {"function": "mine:loss"}}
DOCS = Path(__file__).parents[4] / "docs" / "objectives.md"


def kind_of(model: Any) -> str:
    return str(model.model_fields["kind"].default)


def accepted(model: Any) -> list[Any]:
    """The corrections that an objective can have."""
    if model not in CORRECTABLE:
        return []
    return [c for c in CORRECTIONS if c in members(model.model_fields["correction"].annotation)]


def members(annotation: Any) -> list[Any]:
    return [m for part in get_args(annotation) for m in members(part)] or [annotation]


def section(model: Any, correction: Any = None) -> dict[str, Any]:
    chosen = {"correction": {"kind": kind_of(correction)}} if correction else {}
    return {"kind": kind_of(model), **REQUIRED.get(kind_of(model), {}), **chosen}


def each_once() -> Iterator[tuple[Any, Any]]:
    """Every objective, and every correction with one of them."""
    left = list(KINDS)
    for correction in CORRECTIONS:
        model = next(m for m in left if correction in accepted(m))
        left.remove(model)
        yield model, correction
    yield from ((model, None) for model in left)


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
    assert set(OBJECTIVES) == set(CORRECTABLE)


@pytest.mark.parametrize(("model", "correction"), each_once(), ids=lambda m: kind_of(m) if m else "default")
def test_every_kind_and_every_correction_round_trips(model: Any, correction: Any, tmp_path: Path) -> None:
    config = validate(tree(section(model, correction), advantage=dict(model.advantage)), "test")
    assert type(config.objective) is model
    path = tmp_path / "c.yaml"
    path.write_text(to_yaml(config))
    assert load_config(path) == config


@pytest.mark.parametrize("model", CORRECTABLE, ids=kind_of)
def test_every_kind_has_every_correction_that_is_defined_for_it(model: Any) -> None:
    token_clip = kind_of(model) in {"grpo", "dr_grpo", "dapo", "reinforce_pp"}
    assert accepted(model) == [c for c in CORRECTIONS if token_clip or c is not AdaptiveClip]
    for correction in CORRECTIONS:
        values = tree(section(model, correction), advantage=dict(model.advantage))
        if correction in accepted(model):
            config = validate(values, "test")
            assert config.objective.correction == correction()
            values["objective"] = config.objective.model_dump(mode="json")
            assert validate(values, "test") == config
        else:
            with pytest.raises(ConfigError, match=r"objective\.correction\.kind: must be one of .*not 'adaptive_clip'"):
                validate(values, "test")


@pytest.mark.parametrize("model", [m for m in KINDS if m.advantage], ids=kind_of)
def test_a_name_without_its_advantages_is_a_contradiction(model: Any) -> None:
    kind = kind_of(model)
    wrong = {"estimator": "group_batch", "normalize_by_std": model.advantage["normalize_by_std"]}
    with pytest.raises(ConfigError, match=f"{kind} is defined with advantage.estimator={model.advantage['estimator']}"):
        validate(tree(section(model), advantage=wrong), "test")


@pytest.mark.parametrize(
    ("objective", "line"),
    [
        ({"kind": "ppo"}, "objective.kind: must be one of 'tbpo', 'grpo'"),
        ({"kind": "dr_grpo"}, "objective.normalizer: required"),
        ({"kind": "custom"}, "objective.function: required"),
        ({"kind": "custom", "function": "a:b", "correction": {"kind": "none"}}, "unknown key 'objective.correction"),
        ({"kind": "gspo", "clip_ratio_low": 0.1}, "unknown key 'objective.clip_ratio_low'"),
        ({"correction": {"kind": "token_mask", "cap": 2.0}}, "unknown key 'objective.correction.cap'"),
        ({"correction": {"kind": "token_tis", "cap": 0.5}}, "objective.correction.cap: "),
        ({"kind": "grpo", "correction": {"kind": "adaptive_clip", "cap": 0.5}}, "objective.correction.cap: "),
        ({"correction": {"kind": "token_mask", "low": 2.0}}, "objective.correction: the band 2 to 5 does not hold 1"),
        ({"correction": {}}, "objective.correction.kind: required"),
    ],
)
def test_faults_name_the_key_as_the_user_wrote_it(objective: Any, line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(tree(objective), "test")
    assert line in str(caught.value)


def test_the_old_key_of_the_overlong_penalty_names_the_new_one() -> None:
    with pytest.raises(ConfigError, match=r"unknown key 'advantage\.overlong_cache', it is now .* kind overlong"):
        validate(tree({}, advantage={"overlong_cache": 300}), "test")


def test_defaults_of_the_corrections() -> None:
    assert SequenceTIS().cap == TBPOConfig().seq_tis_imp_ratio_cap == 2.0
    assert (TokenMask().low, TokenMask().high) == (0.5, 5.0)


def table(heading: str) -> dict[str, list[str]]:
    """Cells of each row of the first table below a heading, by the first name of its first cell."""
    lines = DOCS.read_text().partition(f"{heading}\n")[2].partition("\n|---")[2].partition("\n\n")[0].splitlines()[1:]
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip("|"))] for line in lines]
    return {names(row[0])[0]: row for row in rows}


def names(text: str) -> list[str]:
    return re.findall(r"`(\w+)`", text)


def keys(rows: dict[str, list[str]], kind: str) -> set[str]:
    """The keys that the last cell of a row names: `as X` has those of X, `in place of` takes some away."""
    kept, _, replaced = rows[kind][-1].partition(" in place of ")
    found = [keys(rows, name) if name in rows else {name} for name in names(kept)]
    return set().union(*found) - set(names(replaced))


def test_every_objective_has_its_keys_in_its_own_row() -> None:
    rows = table("# Objectives")
    shared = {name for row in table("## Penalty and bonus").values() for name in names(row[0])}
    ablations = re.search(r"Ablations of TBPO.*?\. ", DOCS.read_text(), re.DOTALL)
    assert ablations
    assert list(rows) == [kind_of(model) for model in KINDS]
    for model in KINDS:
        found = keys(rows, kind_of(model)) | shared | {"kind"}
        found |= set(names(ablations[0])) if model is TBPOConfig else set()
        assert found == set(model.model_fields), model


def test_every_correction_has_its_keys_in_its_own_row() -> None:
    rows = table("## Corrections")
    assert set(rows) == {kind_of(model) for model in CORRECTIONS}
    for model in CORRECTIONS:
        assert keys(rows, kind_of(model)) | {"kind"} == set(model.model_fields), model
    only = names(rows["adaptive_clip"][1].partition("only with")[2])
    assert only == [kind_of(model) for model in KINDS if AdaptiveClip in accepted(model)]


def test_every_key_is_listed() -> None:
    known = {key for key, _, _ in documentation()}
    for model in KINDS:
        assert {f"objective.{name}" for name in model.model_fields} <= known
    for model in CORRECTIONS:
        assert {f"objective.correction.{name}" for name in model.model_fields} <= known

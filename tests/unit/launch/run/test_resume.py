"""What may change between a run and its continuation, and how a change of its inputs is noticed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launch.machine import with_counts
from launch.run.resume import changed_inputs, check_same_run, input_digests
from qarl.config.io import to_yaml, validate
from qarl.config.run import Config
from qarl.errors import ConfigError
from tests.support.fakes import make_prompts


def make_config(**sections: dict[str, Any]) -> Config:
    tree: dict[str, Any] = {"model": {"path": "none"}, "task": {"kind": "sorting"}}
    return validate(tree | sections, "test")


@pytest.mark.parametrize(
    ("key", "value", "same"),
    [
        ("train", {"steps": 7}, True),
        ("eval", {"every": 7}, True),
        ("tracking", {"progress": False}, True),
        ("cluster", {"device": "cpu"}, True),
        ("rollout", {"num_workers": 2}, True),
        ("rollout", {"num_cpus_per_worker": 2.0}, True),
        ("learner", {"num_ranks": 2}, True),
        ("learner", {"num_threads": 2}, True),
        ("learner", {"zero_stage": 2}, False),
        ("train", {"group_size": 7}, False),
        ("rollout", {"scheme": "none"}, False),
        ("seed", 7, False),
        ("task", {"kind": "sorting", "levels": [2]}, False),
    ],
)
def test_a_folder_belongs_to_one_run(tmp_path: Path, key: str, value: Any, same: bool) -> None:
    (tmp_path / "config.yaml").write_text(to_yaml(make_config()))
    assert check_same_run(make_config(), tmp_path) == make_config()
    other = make_config(**{key: value})
    if same:
        check_same_run(other, tmp_path)
        return
    changed = key if key == "seed" else f"{key}.{list(value)[-1]}"
    with pytest.raises(ConfigError, match=rf"was made with other settings \({changed}\)"):
        check_same_run(other, tmp_path)


def test_a_machine_with_other_cores_continues_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ "auto" then means the ranks of the run; workers may be others, also by name."""
    folder = {"dir": str(tmp_path), "name": "it"}
    monkeypatch.setattr("launch.limits.cores", lambda: 2)
    begun = with_counts(make_config(run=folder, cluster={"device": "cpu"}))
    (tmp_path / "it").mkdir()
    (tmp_path / "it/config.yaml").write_text(to_yaml(begun))
    for cores in (1, 8):
        monkeypatch.setattr("launch.limits.cores", lambda cores=cores: cores)
        for rollout in ({}, {"num_workers": 1}):
            config = with_counts(make_config(run=folder, cluster={"device": "cpu"}, rollout=rollout))
            assert check_same_run(config, tmp_path / "it") == begun
            assert (config.learner.num_ranks, config.learner.num_threads) == (1, 2)
            assert config.rollout.num_workers == rollout.get("num_workers", cores)
    again = make_config(run=folder | {"resume": False}, cluster={"device": "cpu"})
    assert with_counts(again).learner.num_threads == 8


def test_every_input_has_a_digest(tmp_path: Path) -> None:
    """What a run reads besides its config: a change of any of them is named, and of nothing else."""
    model, reward, task = tmp_path / "model", tmp_path / "mine.py", tmp_path / "task.py"
    model.mkdir()
    for name in ("tokenizer.json", "chat_template.jinja", "config.json", "model.safetensors"):
        (model / name).write_text("{}")
    reward.write_text("def judge(text, finish_reason, answer): return 1.0\n")
    sections: dict[str, Any] = {
        "model": {"path": str(model)},
        "reward": {"kind": "custom", "function": f"{reward}:judge"},
        "task": {"kind": "custom", "function": f"{task}:problems"},
    }
    task.write_text("def problems(seed): return [], []\n")
    config, prompts, heldout = make_config(**sections), make_prompts(3), make_prompts(2, "h")
    before = input_digests(config, prompts, heldout)
    (tmp_path / "inputs.json").write_text(json.dumps(before))

    def changed(prompts: Any = prompts, heldout: Any = heldout, config: Config = config) -> list[str]:
        return changed_inputs(tmp_path, input_digests(config, prompts, heldout))

    assert changed() == []
    for field in ({"answer": "9"}, {"other_answers": ("9",)}, {"source": "s"}, {"metadata": {"tests": [1]}}):
        found = changed([*prompts[:2], replace(prompts[2], **field)])
        assert found == ["training answers and other fields"], field
    assert changed(heldout=[replace(heldout[0], heldout_set="s"), heldout[1]]) == ["held-out answers and other fields"]
    assert changed([*prompts[:2], replace(prompts[2], token_ids=(1, 9))]) == ["training prompts"]
    assert "held-out prompts" in changed(heldout=[heldout[1], heldout[0]])
    (model / "model.safetensors").write_text("other weights: those of the checkpoint are used")
    assert changed() == []
    for name in ("tokenizer.json", "chat_template.jinja"):
        (model / name).write_text("{ }")
    assert changed() == [f"{model}/chat_template.jinja", f"{model}/tokenizer.json"]
    reward.write_text("def judge(text, finish_reason, answer): return 0.5\n")
    task.write_text("def problems(seed): return [], {}\n")
    files = [f"{model}/chat_template.jinja", f"{model}/tokenizer.json"]
    assert changed() == [f"{reward}:judge", *files, f"{task}:problems"]


def test_the_weights_are_an_input_where_the_objective_refers_to_them(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("w")
    config = make_config(model={"path": str(tmp_path)}, objective={"kind": "grpo", "kl_coef": 0.1})
    assert str(tmp_path / "model.safetensors") in input_digests(config, [], [])


@pytest.mark.parametrize("content", [None, b"", b"[1]", b"\xff"])
def test_unknown_inputs_are_not_trusted(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "inputs.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"inputs\.json: no digests of the run's inputs") as caught:
        changed_inputs(tmp_path, {})
    assert "\n" not in str(caught.value)

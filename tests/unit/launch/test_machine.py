"""Counts that a run takes from its machine and model, and the line that shows them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launch.machine import counts_line, with_counts
from qarl.config.derived import choose_counts
from qarl.config.io import load_config
from qarl.config.shipped import config_path
from tests.support.runs import make_config

README = Path(__file__).parents[3] / "README.md"
CPU = {"device": "cpu"}


@pytest.mark.parametrize(
    ("device", "sections", "line"),
    [
        ("cpu", {}, "learner: 1 rank x 2 threads, 2 rollout workers x 1 thread"),
        ("cpu", {"train": {"max_staleness": 1}}, "learner: 1 rank x 1 thread, 1 rollout worker x 1 thread"),
        ("cpu", {"learner": {"num_ranks": 2}}, "learner: 2 ranks x 1 thread, 2 rollout workers x 1 thread"),
        (
            "cpu",
            {"rollout": {"tensor_parallel_size": 2}},
            "learner: 1 rank x 2 threads, 1 rollout worker x 2 processes of 1 thread",
        ),
        ("cpu", {"debug": {"train_from": "batches"}}, "learner: 1 rank x 2 threads"),
        ("cuda", {}, "learner: 1 rank, 1 rollout worker"),
    ],
)
def test_the_line_says_how_many_of_each(device: str, sections: dict[str, Any], line: str) -> None:
    assert counts_line(choose_counts(make_config(**sections), device, 2), device) == line


def test_the_readme_shows_the_quickstarts_line_on_two_cores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("launch.limits.cores", lambda: 2)
    monkeypatch.chdir(tmp_path)
    config = with_counts(load_config(config_path("quickstart"), ["cluster.device=cpu"]))
    assert f"    {counts_line(config, 'cpu')}\n" in README.read_text()


@pytest.mark.parametrize(
    ("model", "build", "given", "threads"),
    [
        ({"hidden_size": 192}, None, 0, 1),
        ({"hidden_size": 576}, None, 0, 4),
        ({"hidden_size": 192}, None, 2, 2),
        ({"hidden_size": 576}, {"hidden_size": 64}, 0, 4),  # the folder is there already
        (None, {"hidden_size": 64}, 0, 1),
        (None, {"hidden_size": 512}, 0, 4),
        (None, None, 0, 4),  # fetched, or missing
        ({"hidden_size": "many"}, None, 0, 4),  # preflight refuses it
    ],
)
def test_threads_follow_the_models_width(
    model: dict[str, Any] | None,
    build: dict[str, int] | None,
    given: int,
    threads: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("launch.limits.cores", lambda: 4)
    path = tmp_path / "model"
    if model is not None:
        path.mkdir()
        (path / "config.json").write_text(json.dumps({"model_type": "qwen3", **model}))
    sections = {"model": {"path": str(path), "build": build}, "learner": {"num_threads": given}}
    config = with_counts(make_config(run={"dir": str(tmp_path)}, cluster=CPU, **sections))
    assert config.learner.num_threads == threads


def test_a_damaged_model_folder_is_left_to_the_checks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.limits.cores", lambda: 4)
    (tmp_path / "config.json").write_text("{")
    config = with_counts(make_config(run={"dir": str(tmp_path)}, cluster=CPU, model={"path": str(tmp_path)}))
    assert config.learner.num_threads == 4


def test_sizes_of_a_published_model_are_known_before_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.limits.cores", lambda: 4)
    config = make_config(cluster=CPU, model={"path": "no/such/Qwen2.5-0.5B-Instruct"})
    monkeypatch.setattr("qarl.config.derived.NARROW", 897)  # it has 896
    assert with_counts(config).learner.num_threads == 1

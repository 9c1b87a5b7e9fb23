"""Counts that a config leaves to the machine."""

from __future__ import annotations

from typing import Any

import pytest

from qarl.config.derived import choose_counts
from qarl.config.io import validate

Counts = tuple[int, float, int, float]


def counts(device: str, cores: float, **sections: dict[str, Any]) -> Counts:
    """Workers and CPUs of each, ranks and CPUs of each."""
    config = validate({"model": {"path": "m"}, "task": {"kind": "sorting"}, **sections}, "test")
    chosen = choose_counts(config, device, cores)
    rollout, learner = chosen.rollout, chosen.learner
    return rollout.num_workers, rollout.num_cpus_per_worker, learner.num_ranks, learner.num_cpus_per_rank


@pytest.mark.parametrize(("cores", "count"), [(1, 1), (2, 2), (3, 3), (200, 8)])
def test_on_cpu_both_phases_use_every_core(cores: int, count: int) -> None:
    assert counts("cpu", cores) == (count, 0.5, count, 0.5)


def test_a_run_keeps_its_ranks_on_another_machine() -> None:
    config = validate({"model": {"path": "m"}, "task": {"kind": "sorting"}}, "test")
    for cores, cpus in ((1, 0.125), (8, 0.5)):
        chosen = choose_counts(config, "cpu", cores, ranks=4)
        assert (chosen.learner.num_ranks, chosen.learner.num_cpus_per_rank) == (4, cpus)
        assert chosen.rollout.num_workers == cores
    said = validate({"model": {"path": "m"}, "task": {"kind": "sorting"}, "learner": {"num_ranks": 2}}, "test")
    assert choose_counts(said, "cpu", 1, ranks=4).learner.num_ranks == 2  # the folder refuses it


def test_no_more_ranks_than_groups_of_a_minibatch() -> None:
    few = {"train": {"prompts_per_step": 6}, "learner": {"minibatches": 2}}
    assert counts("cpu", 8, **few) == (3, 0.5, 3, 0.5)


def test_elsewhere_there_is_one_of_each() -> None:
    assert counts("cuda", 64) == (1, 1.0, 1, 1.0)
    assert counts("cpu", 64, cluster={"address": "auto"}) == (1, 1.0, 1, 1.0)


def test_what_the_config_says_stays() -> None:
    said = {"rollout": {"num_workers": 1, "num_cpus_per_worker": 2.0}, "learner": {"num_cpus_per_rank": 0.25}}
    assert counts("cpu", 2, **said) == (1, 2.0, 2, 0.25)
    assert counts("cpu", 2, rollout={"num_workers": "auto"}, learner={"num_ranks": 1}) == (2, 0.5, 1, 1.0)

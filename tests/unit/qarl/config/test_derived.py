"""Counts that a config leaves to the machine."""

from __future__ import annotations

from typing import Any

import pytest

from qarl.config.derived import choose_counts
from qarl.config.io import validate

Counts = tuple[int, float, int, float, int]


def counts(device: str, cores: float, **sections: dict[str, Any]) -> Counts:
    """Workers and CPUs of each, ranks and CPUs of each, and threads of a rank."""
    config = validate({"model": {"path": "m"}, "task": {"kind": "sorting"}, **sections}, "test")
    chosen = choose_counts(config, device, cores)
    rollout, learner = chosen.rollout, chosen.learner
    learner = chosen.learner
    cpus = (rollout.num_cpus_per_worker, learner.num_cpus_per_rank)
    return rollout.num_workers, cpus[0], learner.num_ranks, cpus[1], learner.num_threads


@pytest.mark.parametrize(
    ("cores", "workers", "ranks", "threads"), [(1, 1, 1, 1), (2, 2, 1, 2), (3, 3, 1, 3), (12, 8, 2, 6), (200, 8, 8, 8)]
)
def test_on_cpu_both_phases_use_every_core(cores: int, workers: int, ranks: int, threads: int) -> None:
    assert counts("cpu", cores) == (workers, 0.5, ranks, 0.5, threads)


def test_a_run_keeps_its_ranks_and_threads_on_another_machine() -> None:
    config = validate({"model": {"path": "m"}, "task": {"kind": "sorting"}}, "test")
    saved = config.learner.model_copy(update={"num_ranks": 4, "num_threads": 3})
    for cores, cpus in ((1, 0.125), (8, 0.5)):
        chosen = choose_counts(config, "cpu", cores, saved)
        learner = chosen.learner
        assert (learner.num_ranks, learner.num_threads, learner.num_cpus_per_rank) == (4, 3, cpus)
        assert chosen.rollout.num_workers == cores
    said = validate({"model": {"path": "m"}, "task": {"kind": "sorting"}, "learner": {"num_ranks": 2}}, "test")
    assert choose_counts(said, "cpu", 1, saved).learner.num_ranks == 2


def test_no_more_workers_and_ranks_than_groups_of_a_minibatch() -> None:
    few = {"train": {"prompts_per_step": 6}, "learner": {"minibatches": 2}}
    assert counts("cpu", 32, **few) == (3, 0.5, 3, 0.5, 8)


def test_elsewhere_there_is_one_of_each() -> None:
    assert counts("cuda", 64) == (1, 1.0, 1, 1.0, 1)
    assert counts("cpu", 64, cluster={"address": "auto"}) == (1, 1.0, 1, 1.0, 1)
    assert counts("cpu", 64, cluster={"address": "auto"}, learner={"num_cpus_per_rank": 4.0}) == (1, 1.0, 1, 4.0, 4)


def test_an_engine_of_two_processes_takes_two_cores() -> None:
    assert counts("cpu", 6, rollout={"tensor_parallel_size": 2}) == (3, 0.5, 1, 0.5, 6)
    assert counts("cpu", 1, rollout={"tensor_parallel_size": 2}) == (1, 0.25, 1, 0.5, 1)


def test_what_the_config_says_stays() -> None:
    said = {"rollout": {"num_workers": 1, "num_cpus_per_worker": 2.0}, "learner": {"num_cpus_per_rank": 0.25}}
    assert counts("cpu", 2, **said) == (1, 2.0, 1, 0.25, 2)
    assert counts("cpu", 4, rollout={"num_workers": "auto"}, learner={"num_ranks": 2}) == (4, 0.5, 2, 1.0, 2)
    assert counts("cpu", 2, learner={"num_ranks": 2, "num_threads": 3}) == (2, 0.5, 2, 1.0, 3)

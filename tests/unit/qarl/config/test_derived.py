"""Counts that a config leaves to the machine."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest

from qarl.config.derived import NARROW, choose_counts
from qarl.config.io import load_config, validate
from qarl.config.shipped import config_path

Counts = tuple[int, float, int, float, int]


AHEAD = {"max_staleness": 1}


def counts(device: str, cores: float, width: int | None = None, **sections: dict[str, Any]) -> Counts:
    """Workers and CPUs of each, ranks and CPUs of each, and threads of a rank."""
    config = validate({"model": {"path": "m"}, "task": {"kind": "sorting"}, **sections}, "test")
    chosen = choose_counts(config, device, cores, width=width)
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


@pytest.mark.parametrize(
    ("cores", "given", "expected"),
    [
        (1, {}, (1, 1, 1)),
        (2, {}, (1, 1, 1)),
        (3, {}, (1, 1, 2)),
        (8, {}, (4, 1, 4)),
        (40, {}, (8, 4, 8)),
        (8, {"workers": 1}, (1, 1, 7)),
        (8, {"workers": 7}, (7, 1, 1)),
        (8, {"ranks": 3}, (4, 3, 1)),
        (8, {"threads": 2}, (6, 1, 2)),
        (8, {"ranks": 2, "threads": 3}, (2, 2, 3)),
        (40, {"threads": 16}, (8, 2, 16)),
        (8, {"width": 192}, (7, 1, 1)),
        (2, {"workers": 2, "threads": 2}, (2, 1, 2)),  # more than cores: the config says so
        (2, {"shards": 2}, (1, 1, 1)),  # as few as there can be
        (6, {"shards": 2}, (1, 1, 4)),
    ],
)
def test_phases_that_overlap_divide_the_cores(
    cores: int, given: dict[str, int], expected: tuple[int, int, int]
) -> None:
    rollout = {"num_workers": given.get("workers", 0), "tensor_parallel_size": given.get("shards", 1)}
    learner = {"num_ranks": given.get("ranks", 0), "num_threads": given.get("threads", 0)}
    train = {"max_staleness": 1, "prompts_per_step": 32}
    workers, _, ranks, _, threads = counts(
        "cpu", cores, given.get("width"), rollout=rollout, learner=learner, train=train
    )
    assert (workers, ranks, threads) == expected


def test_phases_that_overlap_never_need_more_than_the_cores() -> None:
    for cores, workers, ranks, threads in product(range(2, 80), range(3), range(3), range(4)):
        if (workers or 1) + (ranks or 1) * (threads or 1) > cores:
            continue  # the config asks for more
        learner = {"num_ranks": ranks, "num_threads": threads}
        found = counts("cpu", cores, rollout={"num_workers": workers}, learner=learner, train=AHEAD)
        assert found[0] + found[2] * found[4] <= cores, (cores, workers, ranks, threads)


def test_a_run_that_samples_ahead_keeps_its_learner_and_gives_workers_the_rest() -> None:
    config = validate({"model": {"path": "m"}, "task": {"kind": "sorting"}, "train": AHEAD}, "test")
    saved = config.learner.model_copy(update={"num_ranks": 2, "num_threads": 1})
    for cores, workers in ((2, 1), (8, 6)):
        chosen = choose_counts(config, "cpu", cores, saved)
        assert (chosen.learner.num_ranks, chosen.learner.num_threads) == (2, 1)
        assert chosen.rollout.num_workers == workers


def test_a_narrow_model_has_one_thread_unless_the_config_says_otherwise() -> None:
    narrow, wide = NARROW - 1, NARROW
    assert counts("cpu", 4, narrow) == (4, 0.5, 1, 0.5, 1)
    assert counts("cpu", 4, wide) == (4, 0.5, 1, 0.5, 4)
    assert counts("cpu", 4, narrow, learner={"num_threads": 2}) == (4, 0.5, 1, 0.5, 2)
    address = {"address": "auto"}
    assert counts("cpu", 4, narrow, cluster=address, learner={"num_cpus_per_rank": 4.0}) == (1, 1.0, 1, 4.0, 1)
    config = validate({"model": {"path": "m"}, "task": {"kind": "sorting"}}, "test")
    saved = config.learner.model_copy(update={"num_ranks": 1, "num_threads": 3})
    assert choose_counts(config, "cpu", 4, saved, narrow).learner.num_threads == 3


def test_no_more_workers_than_groups_of_a_step_and_ranks_than_groups_of_a_minibatch() -> None:
    few = {"train": {"prompts_per_step": 6}, "learner": {"minibatches": 2}}
    assert counts("cpu", 32, **few) == (6, 0.5, 3, 0.5, 8)
    recipe = load_config(config_path("smollm2_chain_sum"))
    for cores in (8, 16):
        assert choose_counts(recipe, "cpu", cores).rollout.num_workers == 8


def test_the_quickstart_has_two_workers_and_one_rank_on_two_cores() -> None:
    chosen = choose_counts(load_config(config_path("quickstart")), "cpu", 2, width=192)
    assert (chosen.rollout.num_workers, chosen.learner.num_ranks, chosen.learner.num_threads) == (2, 1, 1)


def test_actors_whose_number_is_given_reserve_half_a_cpu_each_unless_the_config_says_otherwise() -> None:
    given = {"rollout": {"num_workers": 2}, "learner": {"num_ranks": 2}}
    assert counts("cpu", 2, **given) == (2, 0.5, 2, 0.5, 1)  # they fit
    assert counts("cpu", 2, rollout={"num_workers": 1000}) == (1000, 0.5, 1, 0.5, 2)  # that is a mistake, and refused
    assert counts("cpu", 2, rollout={"num_workers": 2, "num_cpus_per_worker": 1.0})[1] == 1.0
    for elsewhere in (counts("cuda", 2, **given), counts("cpu", 2, **given, cluster={"address": "auto"})):
        assert elsewhere[1::2] == (1.0, 1.0)


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
    assert counts("cpu", 4, rollout={"num_workers": "auto"}, learner={"num_ranks": 2}) == (4, 0.5, 2, 0.5, 2)
    assert counts("cpu", 2, learner={"num_ranks": 2, "num_threads": 3}) == (2, 0.5, 2, 0.5, 3)

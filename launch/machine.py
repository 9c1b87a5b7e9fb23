"""What a run computes on: this machine or a cluster, and the share of it that each actor gets."""

from __future__ import annotations

import os
from dataclasses import dataclass
from math import inf
from pathlib import Path

import torch

from launch import limits
from launch.run.resume import saved_learner
from qarl.config.derived import choose_counts, sleeps
from qarl.config.run import Config
from qarl.config.shipped import model_sizes
from qarl.errors import ModelError
from qarl.model_folder import config_json

Bundle = dict[str, float]
"""Resources of one actor: CPU, and GPU where it has one."""


@dataclass(frozen=True)
class Machine:
    """What a run computes on; infinite counts where they are not known.

    Attributes:
        device: "cpu" or "cuda".
        cpus, gpus: of this machine, or of the whole cluster.
        memory: bytes of main memory, likewise.
        is_here: whether the actors run on this machine, whose processor decides on kernels.
    """

    device: str
    cpus: float = inf
    gpus: float = inf
    memory: float = inf
    is_here: bool = False

    @staticmethod
    def of(config: Config, cpus: float, gpus: float, memory: float) -> Machine:
        """With the device that `cluster.device` says: "auto" takes CUDA where there is a GPU."""
        device = config.cluster.device
        if device == "auto":
            device = "cuda" if gpus >= 1 else "cpu"
        return Machine(device, cpus, gpus, memory, is_here=config.cluster.address is None)


def find_machine(config: Config) -> Machine:
    """This machine, or the cluster of `cluster.address`, which is joined. Raises ResourceError: none answers."""
    if config.cluster.address is None:
        return Machine.of(config, float(limits.cores()), float(torch.cuda.device_count()), float(limits.memory()))
    import ray  # slow to import

    from launch.cluster.connect import connect

    connect(config)
    found = ray.cluster_resources()
    return Machine.of(config, found.get("CPU", 0.0), found.get("GPU", 0.0), found.get("memory", 0.0))


def with_counts(config: Config) -> Config:
    """`config` with the counts that are "auto" chosen for this machine; a run that continues keeps its ranks and their
    threads."""
    device = Machine.of(config, 1.0, float(torch.cuda.device_count()), inf).device
    return choose_counts(config, device, limits.cores(), saved_learner(config), _width(config))


def _width(config: Config) -> int | None:
    """Features of the model; None where they are not known: it will be fetched, or `preflight` refuses it."""
    path, build = config.model.path, config.model.build
    if not os.path.exists(path) and build is not None:
        return build.hidden_size
    folder = Path(path) if os.path.exists(path) else model_sizes(path)
    try:
        found = config_json(folder).get("hidden_size") if folder else None
    except ModelError:
        return None
    return found if isinstance(found, int) else None


def counts_line(config: Config, device: str) -> str:
    """How many actors a run has, and on CPU how many threads compute in each."""
    workers, ranks = (len(actors) for actors in bundles(config, device))
    parts = [_number(ranks, "rank"), *([_number(workers, "rollout worker")] if workers else [])]
    if device == "cpu":
        shards = config.rollout.tensor_parallel_size
        engine = "1 thread" if shards == 1 else f"{shards} processes of 1 thread"
        each = (_number(config.learner.num_threads, "thread"), engine)
        parts = [f"{part} x {threads}" for part, threads in zip(parts, each, strict=False)]
    return "learner: " + ", ".join(parts)


def _number(count: int, thing: str) -> str:
    return f"{count} {thing}" + ("" if count == 1 else "s")


def sharing_line(config: Config, device: str) -> str:
    """What an engine on the learner's GPU does while the learner works; empty where each has its own."""
    if device != "cuda" or not config.cluster.colocate:
        return ""
    if sleeps(config, device):
        return "cluster.colocate: the engine gives its GPU memory back while the learner works"
    why = "as it samples meanwhile (train.max_staleness)" if config.cluster.sleep else "(cluster.sleep=false)"
    return f"cluster.colocate: the engine keeps its GPU memory while the learner works, {why}"


def bundles(config: Config, device: str) -> tuple[list[Bundle], list[Bundle]]:
    """Resources of each rollout worker and of each learner rank."""
    gpus = 0.5 if config.cluster.colocate else 1.0
    shards = config.rollout.tensor_parallel_size
    worker: Bundle = {"CPU": config.rollout.num_cpus_per_worker * shards}
    rank: Bundle = {"CPU": config.learner.num_cpus_per_rank}
    if device == "cuda":
        worker["GPU"], rank["GPU"] = gpus * shards, gpus
    workers = 0 if config.debug.train_from else config.rollout.num_workers  # saved batches need no engine
    return [worker] * workers, [rank] * config.learner.num_ranks

"""What follows from a config and the device that it runs on."""

from math import ceil
from typing import TypeVar

from qarl.config.base import Node
from qarl.config.policy import LearnerConfig
from qarl.config.run import Config
from qarl.quant.scheme import KernelKind
from qarl.types import Numerics

N = TypeVar("N", bound=Node)
MOST_WORKERS = 8
"""Rollout workers that are started for cores; each holds a copy of the model."""
MOST_THREADS = 8
"""Threads of one learner rank; with more cores there are more ranks."""
MOST_CORES = 64
"""Cores that learner ranks are started for."""
NARROW = 256
"""Models of fewer features get one thread: at 192 a second one took longer to wake than to work."""


def choose_counts(
    config: Config, device: str, cores: float, saved: LearnerConfig | None = None, width: int | None = None
) -> Config:
    """`config` with numbers of rollout workers, of learner ranks and of their threads in place of "auto".

    On CPU sampling and learning take turns, so both use every core of a machine: a worker on each, and a rank with a
    thread on each, which exchanges no gradients. With `train.max_staleness` they run at the same time and divide the
    cores: workers take half, or what a given learner leaves, and ranks the rest; each has one at least. There are at
    most as many workers as a step has groups, and as many ranks as a minibatch has. Each reserves half a CPU, unless
    the config says otherwise, also where it gives their number; where `auto` chooses more than there are cores, each
    reserves less.

    Args:
        saved: the learner of the run that this one continues, whose ranks and threads stay; None when it begins.
        width: features of the model, where they are known.
    """
    here = device == "cpu" and config.cluster.address is None
    ranks, threads = ((given or kept) for given, kept in zip(_given(config.learner), _given(saved), strict=True))
    if not threads and width is not None and width < NARROW:
        threads = 1
    at_once, shards = config.train.max_staleness > 0, config.rollout.tensor_parallel_size
    for_workers = _beside_learner(cores, ranks, threads) if at_once else cores
    workers = int(max(1, min(for_workers / shards, MOST_WORKERS, config.train.prompts_per_step))) if here else 1
    rollout = _chosen(config.rollout, "num_workers", "num_cpus_per_worker", workers, cores / shards if here else 0)
    for_ranks = max(1, cores - rollout.num_workers * shards) if at_once else cores
    groups, most = config.train.prompts_per_step // config.learner.minibatches, min(for_ranks, MOST_CORES)
    fitting = int(max(1, min(ceil(most / MOST_THREADS), most / max(1, threads), groups))) if here else 1
    learner = _chosen(config.learner, "num_ranks", "num_cpus_per_rank", ranks or fitting, cores if here else 0)
    each = min(MOST_THREADS, for_ranks / learner.num_ranks) if here else learner.num_cpus_per_rank
    learner = learner.model_copy(update={"num_threads": threads or max(1, int(each))})
    return config.model_copy(update={"rollout": rollout, "learner": learner})


def _beside_learner(cores: float, ranks: int, threads: int) -> float:
    """Cores that a learner leaves: half of them where its threads are not given (0)."""
    left = cores - max(1, ranks) * max(1, threads)
    return left if threads else min(cores / 2, left)


def _given(learner: LearnerConfig | None) -> tuple[int, int]:
    """Ranks and threads; 0 for those that are not given."""
    return (learner.num_ranks, learner.num_threads) if learner else (0, 0)


def _chosen(section: N, number: str, cpus: str, chosen: int, cores: float) -> N:
    """`section` with `chosen` for an "auto" number; each reserves a part of `cores`, where 0 leaves its own."""
    given = getattr(section, number)
    share = 0.5 if given else 0.5 * min(1.0, cores / chosen)
    reserved = {cpus: share} if cores and cpus not in section.model_fields_set else {}
    return section.model_copy(update={number: given or chosen, **reserved})


def sleeps(config: Config, device: str) -> bool:
    """Whether the engines of a run on `device` give their GPU memory back while the learner works."""
    cluster = config.cluster
    return device == "cuda" and cluster.colocate and cluster.sleep and not config.train.max_staleness


def numerics_of(config: Config, device: str) -> Numerics:
    """The numerics profile of a run on `device`; the naive baseline is plain transformers."""
    if not config.learner.aligned:
        return "stock"
    if config.learner.numerics == "auto":
        return "engine" if device == "cpu" else "portable"
    return config.learner.numerics


def kernel_of(config: Config, numerics: Numerics, device: str) -> KernelKind:
    """The kind of low-bit GEMM that a run requests on `device` under `numerics`."""
    kind = config.learner.kernel
    portable = numerics == "portable" and device == "cpu"  # no engine op there to leave out on GPU
    return "torch" if kind == "auto" and portable else kind

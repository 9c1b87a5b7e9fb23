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
"""Models of fewer features are faster on one thread: at 192 a second one took longer to wake than to work."""


def choose_counts(config: Config, device: str, cores: float, saved: LearnerConfig | None = None) -> Config:
    """`config` with numbers of rollout workers, of learner ranks and of their threads in place of "auto".

    On CPU sampling and learning take turns, so both use every core of a machine: a worker on each, and a rank with a
    thread on each, which exchanges no gradients. Workers and ranks are at most as many as a minibatch has groups. Each
    reserves half a CPU, unless the config says otherwise, and less where there are more of them than cores.

    Args:
        saved: the learner of the run that this one continues, whose ranks and threads stay; None when it begins.
    """
    groups = config.train.prompts_per_step // config.learner.minibatches
    here = device == "cpu" and config.cluster.address is None
    engines = cores / config.rollout.tensor_parallel_size  # for which there are cores
    workers = int(max(1, min(engines, MOST_WORKERS, groups))) if here else 1
    ranks = max(1, min(ceil(min(cores, MOST_CORES) / MOST_THREADS), groups)) if here else 1
    rollout = _chosen(config.rollout, "num_workers", "num_cpus_per_worker", workers, engines if here else 0)
    number = (saved and saved.num_ranks) or ranks
    learner = _chosen(config.learner, "num_ranks", "num_cpus_per_rank", number, cores if here else 0)
    threads = min(MOST_THREADS, cores / learner.num_ranks) if here else learner.num_cpus_per_rank
    chosen = (saved and saved.num_threads) or max(1, int(threads))
    learner = learner.model_copy(update={"num_threads": learner.num_threads or chosen})
    return config.model_copy(update={"rollout": rollout, "learner": learner})


def _chosen(section: N, number: str, cpus: str, chosen: int, cores: float) -> N:
    """`section` with `chosen` for an "auto" number, of which each reserves a part of `cores`; 0 leaves its own."""
    if getattr(section, number):
        return section
    reserved = {cpus: 0.5 * min(1.0, cores / chosen)} if cores and cpus not in section.model_fields_set else {}
    return section.model_copy(update={number: chosen, **reserved})


def rank_threads(learner: LearnerConfig, hidden_size: int) -> int:
    """Threads that a rank on CPU computes with, for a model of this width."""
    return 1 if hidden_size < NARROW else max(1, learner.num_threads)


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

"""What follows from a config and the device that it runs on."""

from qarl.config.base import Node
from qarl.config.run import Config
from qarl.quant.scheme import KernelKind
from qarl.types import Numerics

MOST_BY_CORES = 8
"""Workers and ranks that are started for cores; each holds a copy of the model."""


def choose_counts(config: Config, device: str, cores: float, ranks: int = 0) -> Config:
    """`config` with numbers of rollout workers and learner ranks in place of "auto".

    On CPU sampling and learning take turns, so both use every core of a machine: each actor reserves half a CPU, unless
    the config says otherwise, and less where there are more actors than cores. Ranks are at most as many as a minibatch
    has groups.

    Args:
        ranks: number of learner ranks of the run that this one continues; 0 when it begins.
    """
    groups = config.train.prompts_per_step // config.learner.minibatches
    here = device == "cpu" and config.cluster.address is None
    count = int(max(1, min(cores, MOST_BY_CORES, groups))) if here else 1
    sections: dict[str, Node] = {}
    for section, number, cpus, chosen in (
        ("rollout", "num_workers", "num_cpus_per_worker", count),
        ("learner", "num_ranks", "num_cpus_per_rank", ranks or count),
    ):
        node: Node = getattr(config, section)
        if not getattr(node, number):
            reserved = {cpus: 0.5 * min(1.0, cores / chosen)} if here and cpus not in node.model_fields_set else {}
            sections[section] = node.model_copy(update={number: chosen, **reserved})
    return config.model_copy(update=sections)


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

"""What a config asks of its device and placement that they do not have; needs no Ray."""

from __future__ import annotations

from qarl.config.run import Config
from qarl.errors import ConfigError, ResourceError


def check_settings(config: Config, device: str) -> None:
    """Raises ConfigError or ResourceError for settings that contradict each other, or that `device` does not have."""
    if device == "cpu" and config.rollout.batch_invariant:
        raise ConfigError(
            "is a mode of the GPU engine; on CPU the pinned kernels give a token one value in any batch",
            where="rollout.batch_invariant",
            mend="set it to false",
        )
    _check_transport(config, device)
    pairs = (config.rollout.num_workers, config.learner.num_ranks)
    if device == "cuda" and config.cluster.colocate and pairs != (1, 1):
        raise ResourceError(
            "only one rollout worker and one learner rank can share a GPU", "cluster.colocate", "set it to false"
        )


def _check_transport(config: Config, device: str) -> None:
    transport = config.rollout.transport
    if transport != "object_store" and device == "cpu":
        raise ConfigError(
            f"{transport} is a transport between GPUs", where="rollout.transport", mend="set it to object_store"
        )
    if transport == "nccl" and config.cluster.colocate:
        raise ConfigError(
            "NCCL cannot have two processes on one GPU", where="rollout.transport", mend="set it to ipc or object_store"
        )
    if transport == "ipc" and not config.cluster.colocate:
        raise ConfigError(
            "ipc reads the memory of a GPU that worker and learner share",
            where="rollout.transport",
            mend="set it to nccl or object_store, or cluster.colocate to true",
        )

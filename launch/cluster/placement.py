"""Ray: joining or starting it, checking what it has, placing the actors."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import ray
import torch
from ray.exceptions import AuthenticationError
from ray.util.placement_group import PlacementGroup, placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from launch.preflight import check_settings
from qarl.config.run import Config
from qarl.config.schedule import schemes_of
from qarl.errors import ResourceError
from qarl.quant.formats import check_processor, engine_kernels
from qarl.quant.scheme import QuantScheme
from qarl.remote import free_address
from qarl.weights.source import Tensors, WeightSender
from rollout.engine import VLLMEngine, engine_env
from rollout.fleet import RayFleet
from rollout.worker import RolloutWorker
from trainer.learner import LearnerRank, learner_env
from trainer.ranks import LearnerGroup

Bundle = dict[str, float]


def connect(config: Config) -> None:
    """Join the cluster at `cluster.address`, or start a Ray of our own that ends with this process."""
    address = config.cluster.address
    if address is None:
        # "local": without it Ray would join whatever cluster this machine already runs.
        gpus = torch.cuda.device_count()
        ray.init("local", num_gpus=gpus, include_dashboard=False, log_to_driver=False, logging_level="error")
        return
    try:
        _knock(address)
        ray.init(address, log_to_driver=False, logging_level="error")
    except AuthenticationError as error:
        raise ResourceError(
            "the cluster refused this machine's token",
            where=f"cluster.address {address}",
            mend="copy ~/.ray/auth_token from the head (mode 600), or set RAY_AUTH_TOKEN",
        ) from error
    except OSError as error:
        raise ResourceError(
            f"no Ray cluster answers at {address} ({error})",
            where="cluster.address",
            mend="start one with launch/cluster/ray_cluster.sh head",
        ) from error


def _knock(address: str) -> None:
    """Raises OSError when nothing listens at host:port: Ray itself would wait for minutes."""
    host, _, port = address.rpartition(":")
    if host and port.isdigit():  # not "auto", nor Ray's own kind of address
        socket.create_connection((host, int(port)), timeout=5.0).close()


def device_of(config: Config) -> str:
    """ "cpu" or "cuda": what `cluster.device` says, or what the cluster has."""
    if config.cluster.device != "auto":
        return config.cluster.device
    return "cuda" if ray.cluster_resources().get("GPU", 0) >= 1 else "cpu"


def bundles(config: Config, device: str) -> tuple[list[Bundle], list[Bundle]]:
    """Resources of each rollout worker and of each learner rank."""
    share = 0.5 if config.cluster.colocate else 1.0
    worker: Bundle = {"CPU": config.rollout.num_cpus_per_worker}
    rank: Bundle = {"CPU": config.learner.num_cpus_per_rank}
    if device == "cuda":
        worker["GPU"] = share
        rank["GPU"] = share
    return [worker] * config.rollout.num_workers, [rank] * config.learner.num_ranks


def check_resources(config: Config, device: str, there: Mapping[str, float]) -> None:
    """Can the cluster as a whole run this config on `device`? Waiting for what it lacks would never end.

    Raises:
        ResourceError: it has less than the actors ask for.
        ConfigError: a setting or a scheme that `device`, or this machine's processor, does not have.
    """
    check_settings(config, device)
    for scheme in schemes_of(config.rollout):
        engine_kernels(scheme, device)
    if config.cluster.address is None:  # in a cluster each engine looks at its own processor
        for scheme in schemes_of(config.rollout):
            check_processor(scheme, device)
    workers, ranks = bundles(config, device)
    for kind, unit in (("GPU", "GPUs"), ("CPU", "CPUs")):
        asked = sum(bundle.get(kind, 0.0) for bundle in workers + ranks)
        if asked > there.get(kind, 0.0):
            raise ResourceError(
                f"{config.rollout.num_workers} rollout workers and {config.learner.num_ranks} learner ranks ask for "
                f"{asked:g} {unit}, {there.get(kind, 0.0):g} are there",
                mend="lower rollout.num_workers or learner.num_ranks, or add nodes"
                if kind == "CPU"
                else "lower rollout.num_workers or learner.num_ranks, let one pair share a GPU "
                "(cluster.colocate=true), or add nodes",
            )


class Placement:
    """The placement group of a run: one bundle per actor, workers first."""

    def __init__(self, config: Config, device: str) -> None:
        check_resources(config, device, ray.cluster_resources())
        self._config, self._device = config, device
        workers, ranks = bundles(config, device)
        self._bundles = workers + ranks
        self._group: PlacementGroup = placement_group(self._bundles, strategy=config.cluster.placement_strategy)
        if not self._group.wait(config.cluster.placement_timeout_s):
            raise ResourceError(
                f"the actors could not be placed within {config.cluster.placement_timeout_s:g} s: other jobs hold the "
                f"resources, or {config.cluster.placement_strategy} does not fit the nodes",
                mend="see `ray status`; change cluster.placement_strategy or wait",
            )

    def options(self, bundle: int, env: Mapping[str, str]) -> dict[str, Any]:
        """Ray options of the actor in `bundle`."""
        resources = self._bundles[bundle]
        return {
            "num_cpus": resources["CPU"],
            "num_gpus": resources.get("GPU", 0.0),
            "scheduling_strategy": PlacementGroupSchedulingStrategy(self._group, bundle),
            "runtime_env": {"env_vars": dict(env)},
        }

    def start_fleet(
        self, model_dir: Callable[[QuantScheme], Path], scheme: QuantScheme, note: Callable[[str], None]
    ) -> RayFleet:
        """Start the rollout workers. Returns before their engines are up.

        `model_dir` gives the folder of an engine's config in a scheme.
        """
        config, device = self._config, self._device
        env = engine_env(device, config.rollout)

        def make_actor(worker: int, scheme: QuantScheme) -> Any:
            actor = ray.remote(RolloutWorker).options(**self.options(worker, env))
            return actor.remote(_EngineFactory(config, model_dir(scheme), device, scheme), worker)

        rollout = config.rollout
        return RayFleet(make_actor, scheme, rollout.num_workers, rollout.timeout_s, rollout.max_restarts, note)

    def start_learner(self, fleet: RayFleet) -> LearnerGroup:
        """Start the learner ranks, which publish to `fleet`, and wait until they are up."""
        config, device = self._config, self._device
        first, count = config.rollout.num_workers, config.learner.num_ranks
        env = learner_env(device, max(1, int(config.learner.num_cpus_per_rank)))
        master = ray.get(ray.remote(free_address).options(**self.options(first, {})).remote())
        actor = ray.remote(LearnerRank)
        transport = config.rollout.transport
        make_sender = None if transport == "object_store" else partial(make_weight_sender, transport)
        return LearnerGroup(
            [
                actor.options(**self.options(first + rank, env)).remote(
                    config, device, rank, count, master, make_sender
                )
                for rank in range(count)
            ],
            transfer=None if make_sender is None else fleet.receivers,
            timeout_s=config.rollout.timeout_s,
        )


def make_weight_sender(transport: Literal["nccl", "ipc"], rank: int, tensors: Tensors) -> WeightSender:
    """vLLM's transfer engine for a learner rank, in that rank's process, which imports vLLM for it."""
    from rollout.send import Sender

    return Sender(transport, rank, tensors)


class _EngineFactory:
    """Builds worker i's engine in the worker's process; picklable."""

    def __init__(self, config: Config, model_dir: Path, device: str, scheme: QuantScheme) -> None:
        self._config, self._model_dir, self._device, self._scheme = config, model_dir.resolve(), device, scheme

    def __call__(self, worker: int) -> VLLMEngine:
        config = self._config
        return VLLMEngine(self._model_dir, config.rollout, self._scheme, config.model.dtype, self._device, worker)

"""Placing the actors on Ray."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import ray
from ray.exceptions import GetTimeoutError
from ray.util.placement_group import PlacementGroup, placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from launch.machine import bundles
from qarl.config.derived import sleeps
from qarl.config.run import Config
from qarl.errors import AGAIN, ResourceError
from qarl.logs import log_file
from qarl.quant.scheme import QuantScheme
from qarl.remote import free_address, get
from qarl.trace import StepTrace
from qarl.weights.source import Tensors, WeightSender
from rollout.engine import VLLMEngine, engine_env
from rollout.fleet import RayFleet
from rollout.worker import RolloutWorker
from trainer.learner import LearnerRank, learner_env
from trainer.ranks import LearnerGroup


class Placement:
    """The placement group of a run: one bundle per actor, workers first. The actors' logs go to `log_dir`."""

    def __init__(self, config: Config, device: str, log_dir: Path) -> None:
        self._config, self._device, self._log_dir = config, device, log_dir.resolve()
        workers, ranks = bundles(config, device)
        self._bundles, self._first_rank = workers + ranks, len(workers)
        self._group: PlacementGroup = placement_group(self._bundles, strategy=config.cluster.placement_strategy)
        if not self._group.wait(config.cluster.placement_timeout_s):
            raise ResourceError(
                f"the actors could not be placed within {config.cluster.placement_timeout_s:g} s: other jobs hold the "
                f"resources, or {config.cluster.placement_strategy} does not fit the nodes",
                hint="see `ray status`; change cluster.placement_strategy or wait",
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
        self, model_dir: Callable[[QuantScheme], Path], scheme: QuantScheme, log: Callable[[str], None]
    ) -> RayFleet:
        """Start the rollout workers. Returns before their engines are up.

        `model_dir` gives the folder of an engine's config in a scheme.
        """
        config, device = self._config, self._device
        env = engine_env(device, config.rollout)

        def make_actor(worker: int, scheme: QuantScheme) -> Any:
            actor = ray.remote(RolloutWorker).options(**self.options(worker, env))
            folder = model_dir(scheme).resolve()
            settings = folder, config.rollout, scheme, config.model.dtype, device
            engine = partial(VLLMEngine, *settings, sleeps=sleeps(config, device))
            return actor.remote(
                engine, worker, log_file(self._log_dir, "worker", worker), self._trace("worker", worker)
            )

        rollout = config.rollout
        settings = (rollout.num_workers, config.rollout.responses_at_once, rollout.timeout_s, rollout.max_restarts)
        return RayFleet(make_actor, scheme, *settings, log, self._log_dir)

    def start_learner(self, receivers: Callable[[], list[Any]]) -> LearnerGroup:
        """Start the learner ranks, which publish to the `receivers`, and wait until they are up."""
        config, device = self._config, self._device
        first, count = self._first_rank, config.learner.num_ranks
        env = learner_env(device, config.learner.num_threads)
        master = self._answer(ray.remote(free_address).options(**self.options(first, {})).remote())
        actor = ray.remote(LearnerRank)
        transport = config.rollout.transport
        make_sender = None if transport == "object_store" else partial(make_weight_sender, transport)
        return LearnerGroup(
            [
                actor.options(**self.options(first + rank, env)).remote(
                    config,
                    device,
                    rank,
                    count,
                    master,
                    make_sender,
                    log_file(self._log_dir, "rank", rank),
                    self._trace("rank", rank),
                )
                for rank in range(count)
            ],
            transfer=None if make_sender is None else receivers,
            timeout_s=config.learner.timeout_s,
            transfer_timeout_s=config.rollout.timeout_s,
            log_dir=self._log_dir,
        )

    def _answer(self, call: Any) -> str:
        try:
            return str(get(call, self._config.learner.timeout_s))
        except GetTimeoutError as error:
            what = f"Ray started no process for it within {self._config.learner.timeout_s:g} s"
            raise ResourceError(what, "learner rank 0", AGAIN) from error

    def _trace(self, kind: str, number: int) -> StepTrace | None:
        """The trace of worker 0 and of rank 0, beside the logs; of no other."""
        steps = self._config.debug.profile_steps
        return StepTrace(steps, self._log_dir.parent / "profile" / f"{kind}-0.json") if steps and not number else None


def make_weight_sender(transport: Literal["nccl", "ipc"], rank: int, tensors: Tensors) -> WeightSender:
    """vLLM's transfer engine for a learner rank, in that rank's process, which imports vLLM for it."""
    from rollout.send import Sender

    return Sender(transport, rank, tensors)

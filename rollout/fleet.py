"""All rollout workers: dispatch of requests, weights for every worker, replacement of dead workers."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError

from qarl.errors import ActorError, RolloutError
from qarl.logs import log_file, tail
from qarl.protocols import Prover
from qarl.quant.scheme import QuantScheme
from qarl.remote import deaths, get
from qarl.types import Sample, SampleRequest, WorkerInfo
from qarl.weights.source import WeightSource


class RayFleet:
    """Rollout workers as Ray actors, behind the Fleet protocol.

    A worker that dies, or does not answer within `timeout_s`, is replaced. The new worker loads the current weights, is
    judged by their prover, and then answers its predecessor's requests: equal seeds give the samples that were lost.

    Args:
        make_actor: starts the actor of worker i (a handle of `RolloutWorker`) with an engine in a scheme, without
            waiting for it.
        timeout_s: longest wait for one call.
        max_restarts: replacements before the run stops.
        log_dir: folder of the workers' logs, which messages name; None for no logs.
    """

    def __init__(
        self,
        make_actor: Callable[[int, QuantScheme], Any],
        scheme: QuantScheme,
        num_workers: int,
        timeout_s: float,
        max_restarts: int,
        log: Callable[[str], None],
        log_dir: Path | None = None,
    ) -> None:
        self._make_actor, self._scheme, self._timeout_s, self._log = make_actor, scheme, timeout_s, log
        self._restarts_left, self._log_dir = max_restarts, log_dir
        self._weights: WeightSource | None = None  # what a replacement gets, with whoever judges it
        self._prover: Prover | None = None
        self._actors = [make_actor(i, scheme) for i in range(num_workers)]

    @property
    def actors(self) -> list[Any]:
        return list(self._actors)

    def infos(self) -> list[WorkerInfo]:
        """Each worker's own description; waits until all engines are up."""
        return self._on_each([("info", ())] * len(self._actors))

    def sample(self, requests: Sequence[SampleRequest]) -> list[Sample]:
        """One sample per request, in order. Raises RolloutError: more workers died than `max_restarts`."""
        size = -(-len(requests) // len(self._actors))
        chunks = [requests[i * size : (i + 1) * size] for i in range(len(self._actors))]
        return [sample for chunk in self._on_each([("generate", (c,)) for c in chunks]) for sample in chunk]

    def receivers(self) -> list[Any]:
        """Handles of all workers, dead ones replaced, for new weights to be transferred to.

        Until the next `load` a replacement gets no weights: the learner may no longer have the previous ones.
        """
        self._weights = None
        self.infos()
        return self.actors

    def load(self, weights: WeightSource, prover: Prover | None = None) -> dict[int, float]:
        """Give every worker `weights`, then let `prover` judge all of them; returns what `prover` returns.

        Raises:
            PublicationError: a worker refused the weights and holds the previous ones, or `prover` refused a worker.
            RolloutError: more workers died than `max_restarts`.
        """
        self._weights, self._prover = None, None  # a worker that is replaced meanwhile gets the new ones
        self._on_each([("load", (weights,))] * len(self._actors))
        self._weights = weights
        if prover is None:
            return {}
        version = weights.manifest.version
        samples = self._on_each([("generate", (prover.requests(version),))] * len(self._actors))
        result = prover.judge(dict(enumerate(samples)), version)
        self._prover = prover
        return result

    def switch(self, scheme: QuantScheme) -> None:
        """Start every worker again with an engine in `scheme`; the next `load` gives them weights."""
        self._scheme, self._weights = scheme, None
        for worker, actor in enumerate(self._actors):
            ray.kill(actor)
            self._actors[worker] = self._make_actor(worker, scheme)

    def close(self) -> None:
        for actor in self._actors:
            ray.kill(actor)
        self._actors = []

    def _on_each(self, calls: Sequence[tuple[str, tuple[Any, ...]]]) -> list[Any]:
        """Run call i on worker i, all at once; results in order. A failed worker is replaced and called again."""
        refs = [getattr(actor, method).remote(*args) for actor, (method, args) in zip(self._actors, calls, strict=True)]
        return [self._result(worker, ref, *calls[worker]) for worker, ref in enumerate(refs)]

    def _call(self, worker: int, method: str, *args: Any) -> Any:
        return self._result(worker, getattr(self._actors[worker], method).remote(*args), method, args)

    def _result(self, worker: int, ref: Any, method: str, args: tuple[Any, ...]) -> Any:
        while True:
            try:
                return get(ref, self._timeout_s)
            except GetTimeoutError:
                reason = f"did not answer {method} within {self._timeout_s:g} s"
            except ActorError as error:
                raise RolloutError(error.what, f"rollout worker {worker}, {method}", self._ending(worker)) from error
            except deaths() as error:
                reason = f"died during {method} ({type(error).__name__})"
            self._replace(worker, reason)
            ref = getattr(self._actors[worker], method).remote(*args)

    def _ending(self, worker: int) -> str:
        return tail(log_file(self._log_dir, "worker", worker))

    def _replace(self, worker: int, reason: str) -> None:
        ending = self._ending(worker)
        if self._restarts_left == 0:
            raise RolloutError(reason, f"rollout worker {worker}", ending)
        self._restarts_left -= 1
        reason = f"{reason}; {ending}" if ending else reason
        self._log(f"rollout worker {worker} {reason}; replacing it ({self._restarts_left} replacements left)")
        ray.kill(self._actors[worker])
        self._actors[worker] = self._make_actor(worker, self._scheme)
        if self._weights is not None:
            self._call(worker, "load", self._weights)
            if self._prover is not None:
                version = self._weights.manifest.version
                samples = self._call(worker, "generate", self._prover.requests(version))
                self._prover.judge({worker: samples}, version)

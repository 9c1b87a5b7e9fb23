"""All rollout workers: dispatch of requests, weights for every worker, replacement of dead workers."""

from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from time import monotonic
from typing import Any

import ray
from ray.exceptions import GetTimeoutError

from qarl.errors import ActorError, RolloutError
from qarl.logs import log_file, tail
from qarl.protocols import Prover
from qarl.quant.scheme import QuantScheme
from qarl.remote import deaths, get, how_it_died
from qarl.types import Activity, Sample, SampleRequest, WorkerInfo
from qarl.weights.source import WeightSource
from rollout.dispatch import Dispatcher

STARTING, ASLEEP = "starting", "asleep"
WORDS = {"load": "loading", "generate": "probing", "wake": "waking", "sleep": "going to sleep"}
"""What a worker does during a call to all of them."""


class _DeadWorkerError(Exception):
    """Why a worker counts as dead."""


class RayFleet:
    """Rollout workers as Ray actors, behind the Fleet protocol.

    A worker that dies, or does not answer within `timeout_s`, is replaced. The new worker loads the current weights, is
    judged by their prover, and then answers its predecessor's requests: equal seeds give the samples that were lost.

    Args:
        make_actor: starts the actor of worker i (a handle of `RolloutWorker`) with an engine in a scheme, without
            waiting for it.
        capacity: unfinished requests below which a worker gets another group.
        timeout_s: longest wait for one call, and for one response of those that a worker samples.
        max_restarts: replacements before the run stops.
        log_dir: folder of the workers' logs, which messages name; None for no logs.
    """

    def __init__(
        self,
        make_actor: Callable[[int, QuantScheme], Any],
        scheme: QuantScheme,
        num_workers: int,
        capacity: int,
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
        self._dispatcher = Dispatcher(num_workers, capacity)
        self._requests: dict[int, Sequence[SampleRequest]] = {}  # by number of the group, until it is finished
        self._streams: dict[Any, tuple[int, int]] = {}  # stream of samples -> (group, worker that has it)
        self._samples: dict[int, dict[int, Sample]] = {}  # of groups that workers have, by place
        self._heard: dict[int, float] = {}  # when a worker last finished a response, or began to have any
        self._busy_since: dict[int, float] = {}  # workers that have groups
        self._busy_s = 0.0  # of all workers
        self._finished: dict[int, list[Sample]] = {}
        self._next = 0  # number of the next group
        # What `doing` tells. Lists of one length, whose items are replaced: another thread may read them.
        self._words = [STARTING] * num_workers  # "" where a worker only samples or waits
        self._done = [0] * num_workers  # groups since it had none, or got weights

    @property
    def actors(self) -> list[Any]:
        return list(self._actors)

    def infos(self) -> list[WorkerInfo]:
        """Each worker's own description; waits until all engines are up."""
        return self._on_each([("info", ())] * len(self._actors))

    def doing(self) -> list[Activity]:
        """What each worker does, as far as the fleet knows: no worker is asked. Any thread may call this."""
        found = []
        for worker, word in enumerate(self._words):
            in_hand, done = len(self._dispatcher.given(worker)), self._done[worker]
            samples = in_hand and not word
            found.append(Activity("sampling", done, done + in_hand) if samples else Activity(word or "idle"))
        return found

    def submit(self, groups: Sequence[Sequence[SampleRequest]], first: bool = False) -> list[int]:
        """Ask for groups, behind all that wait, or `first`; returns their numbers."""
        numbers = list(range(self._next, self._next + len(groups)))
        self._next += len(groups)
        self._requests |= zip(numbers, groups, strict=True)
        for number in reversed(numbers) if first else numbers:
            self._dispatcher.add(number, len(self._requests[number]), first)
        self._dispatch()
        return numbers

    def poll(self, timeout_s: float) -> dict[int, list[Sample]]:
        """Finished groups by number; waits at most `timeout_s` for the first one.

        Raises RolloutError: more workers died than `max_restarts`, or a worker failed.
        """
        self._dispatch()
        self._advance(0.0 if self._finished else timeout_s)
        finished, self._finished = self._finished, {}
        return finished

    def queued(self) -> set[int]:
        return self._dispatcher.waiting()

    def abort(self, numbers: Sequence[int]) -> None:
        for stream in [stream for stream, (number, _) in self._streams.items() if number in numbers]:
            del self._streams[stream]
            ray.cancel(stream)
        for number in numbers:
            if self._finished.pop(number, None) is None:
                self._forget(number)

    def sample(self, requests: Sequence[SampleRequest]) -> list[Sample]:
        """One sample per request, in order, before all that waits. Raises RolloutError: as `poll`."""
        groups = [list(group) for _, group in groupby(requests, key=lambda request: request.prompt.id)]
        numbers = self.submit(groups, first=True)
        while any(number in self._requests for number in numbers):
            self._dispatch()
            self._advance(self._timeout_s)
        return [sample for number in numbers for sample in self._finished.pop(number)]

    def busy_s(self) -> float:
        now = monotonic()
        return (self._busy_s + sum(now - since for since in self._busy_since.values())) / len(self._actors)

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
        self._weights, self._prover = None, None  # a worker that is replaced meanwhile gets the new ones alone
        while not all(r.partial for number, _ in self._streams.values() for r in self._requests[number]):
            self._advance(self._timeout_s)  # an engine takes weights when only partial requests run
        self._on_each([("load", (weights,))] * len(self._actors))
        self._weights = weights
        self._done = [0] * len(self._actors)
        self._heard |= dict.fromkeys(self._busy_since, monotonic())
        if prover is None:
            return {}
        version = weights.manifest.version
        samples = self._on_each([("generate", (prover.requests(version),))] * len(self._actors))
        result = prover.judge(dict(enumerate(samples)), version)
        self._prover = prover
        return result

    def sleep(self) -> None:
        self._on_each([("sleep", ())] * len(self._actors))

    def wake(self) -> None:
        """Wake all workers; one that has died asleep is replaced by one that is awake, with the same weights."""
        self._on_each([("wake", ())] * len(self._actors))

    def switch(self, scheme: QuantScheme) -> None:
        """Start every worker again with an engine in `scheme`; the next `load` gives them weights."""
        self._scheme, self._weights, self._words = scheme, None, [STARTING] * len(self._actors)
        for worker, actor in enumerate(self._actors):
            ray.kill(actor)
            self._actors[worker] = self._make_actor(worker, scheme)

    def close(self) -> None:
        for actor in self._actors:
            ray.kill(actor)
        self._actors = []

    def _dispatch(self) -> None:
        """Give waiting groups to workers that have room."""
        for number, worker in self._dispatcher.assign():
            if self._dispatcher.given(worker) == [number]:
                self._heard[worker] = self._busy_since[worker] = monotonic()
                self._done[worker] = 0
            self._samples[number] = {}
            self._streams[self._actors[worker].stream.remote(self._requests[number])] = number, worker

    def _advance(self, timeout_s: float) -> None:
        """Wait for a response to finish, at most `timeout_s`; take all that are finished, and replace dead workers."""
        busy = {worker for _, worker in self._streams.values()}
        if not busy:
            return
        left = min(self._heard[worker] for worker in busy) + self._timeout_s - monotonic()
        ray.wait(list(self._streams), num_returns=1, timeout=max(0.0, min(timeout_s, left)))
        ended, _ = ray.wait(list(self._streams), num_returns=len(self._streams), timeout=0)
        faults: dict[int, str] = {}
        for stream in ended:
            number, worker = self._streams[stream]
            self._heard[worker] = monotonic()
            try:
                self._take(stream, number, worker)
            except _DeadWorkerError as fault:
                faults[worker] = str(fault)
        for worker in busy:
            if monotonic() > self._heard[worker] + self._timeout_s:
                faults[worker] = f"did not answer generate within {self._timeout_s:g} s"
        for worker, reason in faults.items():
            self._replace(worker, reason)

    def _take(self, stream: Any, number: int, worker: int) -> None:
        """Take the samples that a stream has by now. Raises _DeadWorkerError."""
        samples, size = self._samples[number], len(self._requests[number])
        while len(samples) < size and ray.wait([stream], timeout=0)[0]:
            place, sample = self._answer(worker, next(stream), "generate", None)
            samples[place] = sample
            self._dispatcher.finish_one(number)
        if len(samples) == size:
            del self._streams[stream]
            self._finished[number] = [samples[place] for place in range(size)]
            self._done[worker] += 1
            self._forget(number)

    def _forget(self, number: int) -> None:
        del self._requests[number]
        self._samples.pop(number, None)
        self._dispatcher.remove(number)
        self._count_busy()

    def _count_busy(self) -> None:
        """Count the time of workers that have no groups any more."""
        for worker in [worker for worker in self._busy_since if not self._dispatcher.given(worker)]:
            self._busy_s += monotonic() - self._busy_since.pop(worker)

    def _on_each(self, calls: Sequence[tuple[str, tuple[Any, ...]]]) -> list[Any]:
        """Run call i on worker i, all at once; results in order. A failed worker is replaced and called again."""
        refs = [getattr(actor, method).remote(*args) for actor, (method, args) in zip(self._actors, calls, strict=True)]
        self._words = [WORDS.get(method, word) for word, (method, _) in zip(self._words, calls, strict=True)]
        results = []
        for worker, ref in enumerate(refs):
            method, args = calls[worker]
            results.append(self._result(worker, ref, method, args))
            if method in WORDS or self._words[worker] != ASLEEP:
                self._words[worker] = ASLEEP if method == "sleep" else ""
        return results

    def _call(self, worker: int, method: str, *args: Any) -> Any:
        return self._result(worker, getattr(self._actors[worker], method).remote(*args), method, args)

    def _result(self, worker: int, ref: Any, method: str, args: tuple[Any, ...]) -> Any:
        while True:
            try:
                return self._answer(worker, ref, method, self._timeout_s)
            except _DeadWorkerError as fault:
                self._replace(worker, str(fault))
            ref = getattr(self._actors[worker], method).remote(*args)

    def _answer(self, worker: int, ref: Any, method: str, timeout_s: float | None) -> Any:
        try:
            return get(ref, timeout_s)
        except GetTimeoutError as error:
            raise _DeadWorkerError(f"did not answer {method} within {timeout_s:g} s") from error
        except ActorError as error:
            raise RolloutError(error.what, f"rollout worker {worker}, {method}", self._ending(worker)) from error
        except deaths() as error:
            raise _DeadWorkerError(f"died during {method} ({how_it_died(error)})") from error

    def _ending(self, worker: int) -> str:
        return tail(log_file(self._log_dir, "worker", worker))

    def _replace(self, worker: int, reason: str) -> None:
        ending = self._ending(worker)
        if self._restarts_left == 0:
            raise RolloutError(reason, f"rollout worker {worker}", ending)
        self._restarts_left -= 1
        self._words[worker] = "restarting"
        reason = f"{reason}; {ending}" if ending else reason
        self._log(f"rollout worker {worker} {reason}; replacing it ({self._restarts_left} replacements left)")
        ray.kill(self._actors[worker])
        self._dispatcher.lose(worker)
        self._count_busy()
        self._streams = {stream: has for stream, has in self._streams.items() if has[1] != worker}
        self._actors[worker] = self._make_actor(worker, self._scheme)
        if self._weights is not None:
            self._call(worker, "load", self._weights)
            if self._prover is not None:
                version = self._weights.manifest.version
                samples = self._call(worker, "generate", self._prover.requests(version))
                self._prover.judge({worker: samples}, version)
            self._words[worker] = ""

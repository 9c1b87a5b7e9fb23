"""Test doubles behind the protocols of `qarl.protocols`. One number, `theta`, is the whole policy."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from qarl.errors import CheckpointError, KernelError, ModelError, PublicationError
from qarl.metrics import Metrics, maximum, mean
from qarl.protocols import Prover, Row, UpdateResult
from qarl.quant.scheme import QuantScheme
from qarl.seeds import derive_seed
from qarl.types import AugmentOutcome, EnvironmentTurn, Prompt, Sample, SampleRequest, Score, TrainSequence, WorkerInfo
from qarl.weights.source import Channel, Manifest, PublishedTensor, PublishedWeights, TransferStep, WeightSource

if TYPE_CHECKING:
    from trainer.weights import StoredWeights

BAD_DIGEST = "bad"
NO_MODEL, BROKEN = "no such model", "broken"


def make_prompts(count: int, prefix: str = "p") -> list[Prompt]:
    """Prompts with ids `p0`, `p1`, ... and levels 1, 2, 3, 1, ..."""
    return [Prompt(f"{prefix}{i}", f"{prefix}{i}=", "answer", (1, 2 + i % 5), 1 + i % 3) for i in range(count)]


def make_weights(version: int, theta: float = 0.0, digest: str = "good") -> PublishedWeights:
    tensor = PublishedTensor("theta", "float64", np.array([theta]), digest)
    return PublishedWeights(Manifest(version, "none", (("theta", digest),), digest), (tensor,))


def logprobs(theta: float, response_ids: Sequence[int]) -> npt.NDArray[np.float32]:
    """What every fake says the policy gives `response_ids`."""
    return np.array([-1.0 - 0.01 * token - 0.1 * abs(theta) for token in response_ids], dtype=np.float32)


class FakeEngine:
    """`Engine`: its tokens depend on seed and weights alone.

    Args:
        worker: its number.
        drift: added to every log-prob that it reports.
        faults: folder of files named by prompt id; a request for that prompt consumes the file and does what it says,
            once: "die" (SIGKILL to this process), "bug" or "hang".
    """

    def __init__(self, worker: int = 0, drift: float = 0.0, faults: Path | None = None) -> None:
        self.worker, self.drift, self.faults = worker, drift, faults
        self.theta, self.version = 0.0, -1
        self.steps, self.asleep = 0, False
        self.running: dict[int, tuple[int, Sample, SampleRequest]] = {}  # first the step at which it began

    def info(self) -> WorkerInfo:
        return WorkerInfo(self.worker, "cpu", ("FakeKernel",), socket.gethostname(), os.getpid(), 64)

    def connect(self, channel: Channel) -> None:
        raise NotImplementedError("weights come with `load` only")

    def receive(self, step: TransferStep) -> None:
        raise NotImplementedError("weights come with `load` only")

    def sleep(self) -> None:
        assert not self.running, "its requests would be lost"
        self.asleep = True

    def wake(self) -> None:
        self.asleep = False

    def load(self, weights: WeightSource) -> None:
        assert not self.asleep
        assert all(request.partial for *_, request in self.running.values()), "a response would be of two versions"
        version = weights.manifest.version
        if weights.manifest.digest == BAD_DIGEST:
            raise PublicationError("theta differs from its digest", where=f"weights version {version}")
        ((tensor,),) = weights.buckets()
        self.theta, self.version = float(tensor.data[0]), version
        for number, (begun, sample, request) in self.running.items():
            self.running[number] = (
                begun,
                self.continued(sample, request, min(self.steps - begun, len(sample.text) - 1)),
                request,
            )

    def continued(self, sample: Sample, request: SampleRequest, kept: int) -> Sample:
        """The first `kept` tokens of an unfinished sample, and after them what the weights of now give."""
        left = request.max_new_tokens - kept
        rest = self._sample(replace(request, seed=derive_seed(request.seed, kept), max_new_tokens=left))
        before = [sample.version] * kept if sample.versions_T is None else sample.versions_T[:kept].tolist()
        return replace(
            rest,
            response_ids=sample.response_ids[:kept] + rest.response_ids,
            logprobs_T=np.concatenate((sample.logprobs_T[:kept], rest.logprobs_T)),
            text=sample.text[:kept] + rest.text,
            versions_T=np.array(before + [self.version] * len(rest.response_ids)) if kept else None,
        )

    def add(self, requests: Mapping[int, SampleRequest]) -> None:
        self.running |= {number: (self.steps, self._sample(request), request) for number, request in requests.items()}

    def step(self) -> dict[int, Sample]:
        """A token of each; a response is finished as soon as it has all of its own."""
        self.steps += 1
        finished = {}
        for number, (begun, sample, _) in list(self.running.items()):
            if self.steps - begun >= len(sample.response_ids):
                finished[number] = sample
                del self.running[number]
        return finished

    def abort(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            self.running.pop(number, None)

    def generate(self, requests: Sequence[SampleRequest]) -> list[Sample]:
        return [self._sample(request) for request in requests]

    def _sample(self, request: SampleRequest) -> Sample:
        assert not self.asleep, "asleep"
        self._maybe_fail(request.prompt.id)
        rng = Random(f"{request.seed}/{self.theta}/{request.temperature}")
        ids = tuple(rng.choices(range(10), k=rng.randint(1, min(4, request.max_new_tokens))))
        logprobs_T = logprobs(self.theta, ids) + np.float32(self.drift)
        reason = "length" if len(ids) == request.max_new_tokens else "stop"
        return Sample(
            request.prompt, ids, logprobs_T, "".join(map(str, ids)), reason, version=self.version, worker=self.worker
        )

    def _maybe_fail(self, prompt_id: str) -> None:
        order = self.faults / prompt_id if self.faults else None
        if order is None or not order.exists():
            return
        what = order.read_text()
        order.unlink()
        if what == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "bug":
            raise ZeroDivisionError("division by zero")
        time.sleep(1000)


class FakeReceiver:
    """A rollout worker as a learner sees it that sends weights: keeps the orders, and does the faults that they hold.

    Here, since an actor imports the module of its class: it starts without torch and vLLM.
    """

    def __init__(self) -> None:
        self._orders: list[Channel | TransferStep] = []

    def connect(self, channel: Channel) -> None:
        self._orders.append(channel)

    def receive(self, step: TransferStep) -> None:
        self._orders.append(step)
        match step.tensors.get("fault"):
            case "die":
                os.kill(os.getpid(), signal.SIGKILL)
            case "refuse":
                raise ValueError("no such tensor\nand more")
            case "wait":
                time.sleep(600)

    def orders(self) -> list[Channel | TransferStep]:
        return self._orders


class FakeFleet:
    """`Fleet` of engines in this process, dealt to by turns; remembers every request and every load."""

    def __init__(self, engines: Sequence[FakeEngine] | None = None) -> None:
        self.engines = list(engines or [FakeEngine(0), FakeEngine(1)])
        self.requests: list[list[SampleRequest]] = []
        self.loads: list[WeightSource] = []
        self.prover: Prover | None = None
        self.switches: list[QuantScheme] = []
        self.finished: dict[int, list[Sample]] = {}
        self._next = 0

    def submit(self, groups: Sequence[Sequence[SampleRequest]]) -> list[int]:
        numbers = list(range(self._next, self._next + len(groups)))
        self._next += len(groups)
        samples = iter(self.sample([request for group in groups for request in group]))
        self.finished |= {
            number: list(islice(samples, len(group))) for number, group in zip(numbers, groups, strict=True)
        }
        return numbers

    def poll(self, timeout_s: float) -> dict[int, list[Sample]]:
        finished, self.finished = self.finished, {}
        return finished

    def queued(self) -> set[int]:
        return set()

    def abort(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            del self.finished[number]

    def busy_s(self) -> float:
        return 0.0

    def sample(self, requests: Sequence[SampleRequest]) -> list[Sample]:
        self.requests.append(list(requests))
        return [self.engines[i % len(self.engines)].generate([r])[0] for i, r in enumerate(requests)]

    def sleep(self) -> None:
        for engine in self.engines:
            engine.sleep()

    def wake(self) -> None:
        for engine in self.engines:
            engine.wake()

    def switch(self, scheme: QuantScheme) -> None:
        self.switches.append(scheme)
        self.engines = [FakeEngine(engine.worker, engine.drift) for engine in self.engines]

    def load(self, weights: WeightSource, prover: Prover | None = None) -> dict[int, float]:
        self.loads.append(weights)
        self.prover = prover
        for engine in self.engines:
            engine.load(weights)
        return self._judge(self.engines)

    def replace(self, engine: FakeEngine) -> None:
        """`engine` takes the place of the worker with its number."""
        self.engines[engine.worker] = engine
        engine.load(self.loads[-1])
        self._judge([engine])

    def _judge(self, engines: Sequence[FakeEngine]) -> dict[int, float]:
        if self.prover is None:
            return {}
        version = self.loads[-1].manifest.version
        requests = self.prover.requests(version)
        return self.prover.judge({engine.info().worker: engine.generate(requests) for engine in engines}, version)

    def close(self) -> None:
        self.engines = []


class FakeProver:
    """`Prover` that keeps what it judges, by weight version and worker."""

    def __init__(self, requests: Sequence[SampleRequest]) -> None:
        self._requests = list(requests)
        self.judged: list[tuple[int, dict[int, list[Sample]]]] = []

    def requests(self, version: int) -> list[SampleRequest]:
        return self._requests

    def judge(self, samples: Mapping[int, Sequence[Sample]], version: int) -> dict[int, float]:
        self.judged.append((version, {worker: list(of_worker) for worker, of_worker in samples.items()}))
        return dict.fromkeys(samples, 0.0)


class FakeLearner:
    """`Learner`: an update moves `theta` by the advantages and lengths in the first half of each minibatch.

    Keeps what it scored (aligned or not) and learned from, one list item for each call. `ratio_devs` are the largest
    ratio deviations that it reports, update by update; 0 when they run out.
    """

    def __init__(self) -> None:
        self.theta = 0.0
        self.ratio_devs: list[float] = []
        self.scored: list[bool] = []
        self.unaligned: list[int] = []
        self.switches: list[QuantScheme] = []
        self.minibatches: list[list[list[TrainSequence]]] = []
        self.thetas: dict[int, float] = {}  # by version

    def score(
        self, sequences: Sequence[TrainSequence], aligned: bool = True, version: int | None = None
    ) -> list[npt.NDArray[np.float32]]:
        self.scored.append(aligned)
        self.unaligned += [] if aligned else [len(sequences)]
        shift = np.float32(0.0 if aligned else 0.5)
        theta = self.theta if version is None else self.thetas[version]
        return [logprobs(theta, sequence.response_ids) + shift for sequence in sequences]

    def update(self, minibatches: Sequence[Sequence[TrainSequence]]) -> UpdateResult:
        self.minibatches.append([list(minibatch) for minibatch in minibatches])
        for minibatch in minibatches:
            half = minibatch[: len(minibatch) // 2]
            self.theta += sum(sequence.advantage * len(sequence.response_ids) for sequence in half)
        return UpdateResult(
            {"actor/updates": float(len(minibatches))}, self.ratio_devs.pop(0) if self.ratio_devs else 0
        )

    def publish(self, version: int) -> PublishedWeights:
        self.thetas[version] = self.theta
        return make_weights(version, self.theta)

    def switch(self, scheme: QuantScheme) -> bool:
        self.switches.append(scheme)
        return True

    def save(self, directory: str) -> None:
        Path(directory, "theta.json").write_text(json.dumps(self.theta))

    def load(self, directory: str) -> None:
        self.theta = float(json.loads(Path(directory, "theta.json").read_text()))

    def export(self, directory: str, quantized: bool) -> None:
        raise NotImplementedError

    def close(self) -> None:
        pass


class FakeRank:
    """A learner rank as an actor: it owns every `world_size`-th sequence, refuses to load, and dies when it saves.

    With the fault `NO_MODEL` it does not start; with `BROKEN` rank 1 fails in a publication and the others wait for it.
    """

    def __init__(self, rank: int, world_size: int, fault: str = "") -> None:
        self.rank, self.world_size, self.fault = rank, world_size, fault

    def start(self) -> None:
        if self.fault == NO_MODEL:
            raise ModelError(self.fault)

    def score(
        self, sequences: Sequence[TrainSequence], aligned: bool, version: int | None
    ) -> dict[int, npt.NDArray[np.float32]]:
        mine = range(self.rank, len(sequences), self.world_size)
        scale = np.float32(-1 if aligned else -2)
        return {i: scale * np.array(sequences[i].response_ids, np.float32) for i in mine}

    def update(self, minibatches: Sequence[object]) -> tuple[list[Metrics], list[float]]:
        metrics: Metrics = {"loss": mean(self.rank * 3.0, self.rank + 1.0), "size": maximum(float(self.rank))}
        return [metrics], [0.25 * self.rank] * len(minibatches[:1])

    def publish(self, version: int) -> StoredWeights | None:
        import ray

        from trainer.weights import StoredWeights

        if self.fault == BROKEN:
            if self.rank == 1:
                raise KernelError("NaN in the weight", where="a layer")
            time.sleep(600)  # in a collective, forever
        weights = make_weights(version, theta=4.0)
        return StoredWeights(weights.manifest, tuple(map(ray.put, weights.buckets()))) if self.rank == 0 else None

    def send(self, version: int, workers: Sequence[object]) -> Manifest | None:
        if self.rank == 1 and not workers:
            time.sleep(1000)
        return make_weights(version, theta=4.0).manifest if self.rank == 0 else None

    def load(self, directory: str) -> None:
        raise CheckpointError("holds no checkpoint", where=directory)

    def save(self, directory: str) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class FakeEnvironments:
    """`Environments` that give "7" and a quarter of the reward after every response; `rules` are other answers, by
    number and turn. Refuses numbers that are not open, and such that were."""

    def __init__(self, rules: Mapping[tuple[int, int], EnvironmentTurn] | None = None) -> None:
        self._rules, self.heard = rules or {}, list[dict[int, str]]()
        self.turns: dict[int, int] = {}
        self.open: set[int] = set()

    def reset(self, prompts: Mapping[int, Prompt]) -> dict[int, EnvironmentTurn]:
        assert self.turns.keys().isdisjoint(prompts)
        self.open |= prompts.keys()
        self.turns |= dict.fromkeys(prompts, 0)
        return {number: self._rules.get((number, 0), EnvironmentTurn()) for number in prompts}

    def step(self, responses: Mapping[int, str]) -> dict[int, EnvironmentTurn]:
        assert responses.keys() <= self.open
        self.heard.append(dict(responses))
        self.turns |= {number: self.turns[number] + 1 for number in responses}
        return {number: self.answer(number, self.turns[number], text) for number, text in responses.items()}

    def answer(self, number: int, turn: int, response: str) -> EnvironmentTurn:
        return self._rules.get((number, turn), EnvironmentTurn("7", 0.25))

    def end(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            self.open.remove(number)

    def close(self) -> None:
        pass


def even_length(sample: Sample) -> float:
    """Reward 1 for a response of an even number of tokens."""
    return float(len(sample.response_ids) % 2 == 0)


class FakeRewards:
    """`RewardService` that applies `rule` to each sample."""

    def __init__(self, rule: Callable[[Sample], float] = even_length) -> None:
        self._rule = rule

    def score(self, samples: Sequence[Sample]) -> list[Score]:
        return [Score(self._rule(sample)) for sample in samples]

    def check(self, prompts: Sequence[Prompt]) -> None:
        pass

    def close(self) -> None:
        pass


class FakeTracker:
    """`Tracker` that keeps what it is given."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.tables: list[tuple[int, int, str]] = []
        self.table_rows: list[Row] = []
        self.notes: list[str] = []
        self.alerts: list[tuple[str, str]] = []
        self.outcomes: list[tuple[int, AugmentOutcome]] = []

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.rows.append((step, dict(metrics)))

    def table(self, step: int, name: str, rows: Sequence[Row]) -> None:
        self.tables.append((step, len(rows), name))
        self.table_rows += rows

    def augmented(self, step: int, outcomes: Sequence[AugmentOutcome]) -> None:
        self.outcomes += [(step, outcome) for outcome in outcomes]

    def note(self, line: str) -> None:
        self.notes.append(line)

    def alert(self, title: str, text: str) -> None:
        self.alerts.append((title, text))

    def phase(self, name: str) -> None:
        pass

    def close(self) -> None:
        pass


class Killed(BaseException):
    """Stands for SIGKILL: nothing after it runs."""


class Fuse:
    """Lets `calls` calls through to all that it guards, then kills; endless when None. Keeps their names, in order."""

    def __init__(self, calls: int | None) -> None:
        self.left, self.made, self.names = calls, 0, list[str]()

    def guard(self, partner: Any) -> Any:
        fuse = self

        class Guarded:
            def __getattr__(self, name: str) -> Any:
                def call(*args: Any, **kwargs: Any) -> Any:
                    if fuse.made == fuse.left:
                        raise Killed
                    fuse.made += 1
                    fuse.names.append(f"{type(partner).__name__.removeprefix('Fake').lower()}.{name}")
                    return getattr(partner, name)(*args, **kwargs)

                return call

        return Guarded()


def wait_until_gone(pid: int) -> None:
    for _ in range(300):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    raise AssertionError(f"process {pid} is still there")

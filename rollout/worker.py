"""The Ray actor around an engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

from qarl.protocols import Engine
from qarl.types import Sample, SampleRequest, WorkerInfo
from qarl.weights.source import Channel, TransferStep, WeightSource


class RolloutWorker:
    """One engine in its own process. The fleet makes a Ray actor of it.

    Args:
        make_engine: builds the engine, given the worker's number; runs in the actor's process.
        worker: this worker's number.
    """

    def __init__(self, make_engine: Callable[[int], Engine], worker: int) -> None:
        self._make_engine, self._worker = make_engine, worker

    @cached_property
    def _engine(self) -> Engine:
        # Not in the constructor: Ray would hand its errors on as text, and their type is lost.
        return self._make_engine(self._worker)

    def info(self) -> WorkerInfo:
        return self._engine.info()

    def generate(self, requests: Sequence[SampleRequest]) -> list[Sample]:
        return self._engine.generate(requests)

    def connect(self, channel: Channel) -> None:
        self._engine.connect(channel)

    def receive(self, step: TransferStep) -> None:
        self._engine.receive(step)

    def load(self, weights: WeightSource) -> None:
        self._engine.load(weights)

"""The Ray actor around an engine."""

import logging
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

from qarl.logs import redirect_output
from qarl.protocols import Engine
from qarl.trace import StepTrace
from qarl.types import Sample, SampleRequest, WorkerInfo
from qarl.weights.source import Channel, TransferStep, WeightSource

LOG = logging.getLogger(__name__)


class RolloutWorker:
    """One engine in its own process. The fleet makes a Ray actor of it.

    Args:
        make_engine: builds the engine, given the worker's number; runs in the actor's process.
        worker: this worker's number.
        log_file: where the output of the actor's process goes; None leaves it to Ray.
        trace: of some steps of the process.
    """

    def __init__(
        self,
        make_engine: Callable[[int], Engine],
        worker: int,
        log_file: Path | None = None,
        trace: StepTrace | None = None,
    ) -> None:
        redirect_output(log_file)
        self._make_engine, self._worker, self._trace = make_engine, worker, trace

    @cached_property
    def _engine(self) -> Engine:
        # Not in the constructor: Ray would hand its errors on as text, and their type is lost.
        return self._make_engine(self._worker)

    def info(self) -> WorkerInfo:
        return self._engine.info()

    def generate(self, requests: Sequence[SampleRequest]) -> list[Sample]:
        LOG.info("samples %d requests", len(requests))
        return self._engine.generate(requests)

    def connect(self, channel: Channel) -> None:
        self._engine.connect(channel)

    def receive(self, step: TransferStep) -> None:
        self._engine.receive(step)

    def load(self, weights: WeightSource) -> None:
        LOG.info("loads weights version %d", weights.manifest.version)
        self._engine.load(weights)
        if self._trace:
            self._trace.published(weights.manifest.version)

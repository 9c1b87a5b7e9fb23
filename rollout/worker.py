"""The Ray actor around an engine."""

import asyncio
import logging
import multiprocessing
import os
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from multiprocessing.connection import wait
from pathlib import Path
from threading import Thread
from typing import TypeVar, cast

from qarl.logs import redirect_output
from qarl.protocols import Engine
from qarl.trace import StepTrace, span
from qarl.types import Sample, SampleRequest, WorkerInfo
from qarl.weights.source import Channel, TransferStep, WeightSource

LOG = logging.getLogger(__name__)
Result = TypeVar("Result")


Item = tuple[int, Sample] | Exception
"""A finished request's place in its group, and its sample; or what has failed."""


@dataclass
class _Group:
    """Requests of one call of `stream`, which gets each item from `tell`, in any thread.

    Attributes:
        numbers: of the requests, within the engine.
        left: how many are not finished.
        is_forgotten: nobody waits for them any more.
    """

    requests: Sequence[SampleRequest]
    tell: Callable[[Item], None]
    numbers: range = range(0)
    left: int = 0
    is_forgotten: bool = False

    @property
    def partial(self) -> bool:
        return all(request.partial for request in self.requests)


class RolloutWorker:
    """One engine in its own process. The fleet makes a Ray actor of it.

    One thread owns the engine. While requests run, it steps the engine again and again; what other calls need of the
    engine, it does between two steps. So any number of calls can wait here at once. A call of `stream` or `generate`
    that is cancelled ends its requests.

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
        self._thread = ThreadPoolExecutor(1, "engine")
        self._groups: list[_Group] = []
        self._sampling = ExitStack()  # the span from the first group to the end of the last
        self._next = 0  # number of the next request

    async def info(self) -> WorkerInfo:
        return await self._between_steps(lambda: self._engine.info())

    async def generate(self, requests: Sequence[SampleRequest]) -> list[Sample]:
        """One sample per request, in order."""
        samples = {place: sample async for place, sample in self.stream(requests)}
        return [samples[place] for place in range(len(requests))]

    async def stream(self, requests: Sequence[SampleRequest]) -> AsyncIterator[tuple[int, Sample]]:
        """The place and the sample of each request, as soon as it is finished."""
        LOG.info("samples %d requests", len(requests))
        loop, items = asyncio.get_running_loop(), asyncio.Queue[Item]()

        def tell(item: Item) -> None:
            loop.call_soon_threadsafe(items.put_nowait, item)

        group = _Group(requests, tell)
        try:
            await self._between_steps(lambda: self._begin(group))
            for _ in requests:
                item = await items.get()
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            group.is_forgotten = True

    async def connect(self, channel: Channel) -> None:
        await self._between_steps(span("connect")(lambda: self._engine.connect(channel)))

    async def receive(self, step: TransferStep) -> None:
        await self._between_steps(span("receive")(lambda: self._engine.receive(step)))

    async def load(self, weights: WeightSource) -> None:
        """Take weights as soon as only partial requests run: a call that the fleet has cancelled may not have ended,
        or its requests may only begin now."""
        while not await self._between_steps(lambda: self._load(weights)):
            pass

    async def sleep(self) -> None:
        """Sleep as soon as nothing runs: as in `load`."""
        while not await self._between_steps(self._sleep):
            pass

    async def wake(self) -> None:
        LOG.info("wakes")
        await self._between_steps(span("wake")(lambda: self._engine.wake()))

    # In the engine's thread

    async def _between_steps(self, call: Callable[[], Result]) -> Result:
        return await asyncio.wrap_future(self._thread.submit(call))

    @cached_property
    def _engine(self) -> Engine:
        # Not in the constructor: Ray would hand its errors on as text, and their type is lost.
        before = multiprocessing.active_children()
        with span("start"):
            engine = self._make_engine(self._worker)
        processes = [child.sentinel for child in multiprocessing.active_children() if child not in before]
        if processes:  # of a tensor-parallel engine
            Thread(target=_end_with, args=(processes,), daemon=True).start()
        return engine

    def _load(self, weights: WeightSource) -> bool:
        """Whether the weights could be loaded now."""
        if not all(group.partial for group in self._groups):
            return False
        LOG.info("loads weights version %d", weights.manifest.version)
        with span("load"):
            self._engine.load(weights)
        if self._trace:
            self._trace.published(weights.manifest.version)
        return True

    def _sleep(self) -> bool:
        """Whether the engine could sleep now."""
        if self._groups:
            return False
        LOG.info("sleeps")
        with span("sleep"):
            self._engine.sleep()
        return True

    def _begin(self, group: _Group) -> None:
        group.left = len(group.requests)
        group.numbers = range(self._next, self._next + group.left)
        self._next = group.numbers.stop
        self._engine.add(dict(zip(group.numbers, group.requests, strict=True)))
        if not group.left:
            return
        self._groups.append(group)
        if len(self._groups) == 1:
            self._sampling.enter_context(span("sample"))
            self._step_soon()

    def _step_soon(self) -> None:
        """Step after the calls that wait already."""
        self._thread.submit(self._step).add_done_callback(self._stepped)

    def _step(self) -> None:
        for group in [group for group in self._groups if group.is_forgotten]:
            self._engine.abort(group.numbers)
            self._groups.remove(group)
        finished = self._engine.step() if self._groups else {}
        for group in list(self._groups):
            ended = [number for number in group.numbers if number in finished]
            group.left -= len(ended)
            if not group.left:
                self._groups.remove(group)
            for number in ended:
                group.tell((number - group.numbers.start, finished[number]))

    def _stepped(self, step: "Future[None]") -> None:
        if error := step.exception():  # of every group alike: who knows what the engine still has of them
            failed, self._groups = self._groups, []
            try:
                for group in failed:
                    self._engine.abort(group.numbers)
            finally:
                for group in failed:
                    group.tell(cast(Exception, error))
        if self._groups:
            self._step_soon()
        else:
            self._sampling.close()


def _end_with(sentinels: list[int]) -> None:
    """End this process as soon as one of these has ended: the fleet then replaces the worker."""
    wait(sentinels)
    os._exit(1)

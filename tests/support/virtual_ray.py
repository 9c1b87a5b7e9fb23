"""Ray in virtual time, around the real fleet, the real workers and the real engines; vLLM alone is a double.

Every worker lives in this process. One thing happens after the other, and a random generator chooses which: a worker
does the next thing that its engine's thread has to do (begin requests, one step, load), a cancelled call hears of it,
a worker dies, or stops without a word.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from random import Random
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import ray
from ray.exceptions import ActorDiedError, GetTimeoutError

from qarl.quant.scheme import QuantScheme
from rollout.engine import VLLMEngine
from rollout.worker import RolloutWorker
from tests.support.fakes import logprobs

TURNS = 8
"""Turns of the event loop after which every call waits for its engine's thread."""
EVENT_S = 1.0
"""How long each thing takes."""
MEANWHILE = 6
"""At most so many happen while the driver does other things than to wait."""

MOST_WAITS = 10**5
"""Of one run."""


def next_token(seed: int, place: int, theta: float) -> tuple[int, bool]:
    """The token at a place of a response, and whether it is the last one."""
    rng = Random(f"{seed}/{place}/{theta}")
    return rng.randrange(10), rng.random() < 0.15


class LLM:
    """vLLM: each step gives every request that runs its next token."""

    def __init__(self, longest: int) -> None:
        self.theta, self.running = math.nan, dict[str, tuple[Any, Any]]()
        self.model_config = SimpleNamespace(max_model_len=longest)
        self.renderer = SimpleNamespace(render_cmpl=lambda prompts: prompts)
        self._sleeping = False
        self.llm_engine = self

    def collective_rpc(self, method: str, args: tuple[Any, ...]) -> list[Any]:
        assert method == "qarl_take"
        ((theta,),) = args[0].buckets()
        self.theta = float(theta.data[0])
        return [[]]

    def reset_prefix_cache(self, reset_running_requests: bool) -> bool:
        return reset_running_requests or not self.running  # vLLM refuses while its blocks are in use

    def add_request(self, number: str, prompt: Any, request: Any) -> None:
        response = SimpleNamespace(token_ids=[], logprobs=[], text="", finish_reason=None)
        self.running[number] = request, response

    def abort_request(self, numbers: Sequence[str]) -> None:
        for number in numbers:
            del self.running[number]

    def step(self) -> Iterator[Any]:
        assert not self._sleeping
        for number, (request, response) in list(self.running.items()):
            token, is_last = next_token(request.seed, len(response.token_ids), self.theta)
            response.token_ids.append(token)
            response.logprobs.append({token: SimpleNamespace(logprob=logprobs(self.theta, [token])[0])})
            response.text += str(token)
            is_long = len(response.token_ids) == request.max_new_tokens
            response.finish_reason = "length" if is_long else "stop"
            if is_long or is_last:
                del self.running[number]
            if is_long or is_last or request.partial:
                yield SimpleNamespace(request_id=number, finished=is_long or is_last, outputs=[response])

    def sleep(self, level: int) -> None:
        assert not self.running, "its requests would be lost"
        self._sleeping = True

    def wake_up(self) -> None:
        self._sleeping = False

    def is_sleeping(self) -> bool:
        return self._sleeping


def engine_over(llm: Any, blocks: int, block: int = 16) -> VLLMEngine:
    """An engine on a double of vLLM, whose KV cache has so many blocks of so many tokens."""
    engine = object.__new__(VLLMEngine)
    room = {"_block": block, "_blocks": blocks, "_at_once": blocks, "_partial_at_once": max(1, blocks - 2)}
    room["_longest_shared"] = math.inf
    loads = {"_receives": False, "_shards": 1, "_keep_kv": False, "_read_back_every": 1, "_loads": 0}
    held: dict[str, Any] = {"_held": None, "_waiting": {}, "_running": {}, "_scheme": QuantScheme("none")}
    vars(engine).update(room | loads | held, _llm=llm, _worker=0, _device="cpu", _kernels=())
    return engine


class EngineThread:
    """Of a worker: it does its next call when it is told to."""

    def __init__(self, *_: Any) -> None:
        self.calls: deque[tuple[Future[Any], Callable[[], Any]]] = deque()

    def submit(self, call: Callable[..., Any], /, *args: Any) -> Future[Any]:
        self.calls.append((Future(), partial(call, *args)))
        return self.calls[-1][0]

    def do_next(self) -> None:
        """What the call raises is the test's: no engine here refuses anything."""
        future, call = self.calls.popleft()
        if future.set_running_or_notify_cancel():
            future.set_result(call())


@dataclass(eq=False)
class Call:
    """The reference to the result of a call."""

    actor: Actor
    method: str
    args: tuple[Any, ...]
    task: asyncio.Task[Any]
    is_known: bool = False
    """The driver has asked for the result, or has cancelled the call."""

    @property
    def has_ended(self) -> bool:
        return self.task.done() or self.actor.is_dead

    @property
    def is_ready(self) -> bool:
        return self.has_ended


@dataclass(eq=False)
class Stream(Call):
    """The results of a call that gives several; `next` gives the reference to one."""

    items: deque[Any] = field(default_factory=deque)
    taken: int = 0

    @property
    def is_ready(self) -> bool:
        return bool(self.items) or self.has_ended

    def __next__(self) -> Item:
        assert self.is_ready, "waits"
        if not self.items and not self.actor.is_dead and self.task.exception() is None:
            raise StopIteration
        self.taken += bool(self.items)
        return Item(self, self.items.popleft() if self.items else None)


@dataclass(eq=False)
class Item:
    """The reference to one result of a stream; None where the call has failed."""

    stream: Stream
    value: Any


@dataclass(eq=False)
class Actor:
    """The handle of a worker, and the worker."""

    ray: VirtualRay
    worker: RolloutWorker
    is_dead: bool = False
    is_stopped: bool = False
    calls: list[Call] = field(default_factory=list)
    heard: float = 0.0
    """When it last answered a call, or began to have any."""

    @property
    def thread(self) -> EngineThread:
        thread: Any = self.worker._thread
        return thread

    @property
    def version(self) -> int:
        version: int = self.worker._engine.version
        return version

    def __getattr__(self, method: str) -> Any:
        return SimpleNamespace(remote=partial(self.ray.call, self, method))


class VirtualRay:
    """Args: `rng` chooses what happens; `faults`: how many workers may die or stop; `blocks`: of an engine's cache."""

    def __init__(self, rng: Random, faults: int = 0, blocks: int = 8, longest: int = 64) -> None:
        self._rng, self._faults, self._blocks, self._longest = rng, faults, blocks, longest
        self.now, self.actors = 0.0, list[Actor]()
        self._cancelled, self._waits = list[Call](), 0
        self._loop = asyncio.new_event_loop()
        self.on_call: Callable[[Actor, str, tuple[Any, ...]], None] = lambda *_: None
        self.on_wait: Callable[[], None] = lambda: None
        self.on_kill: Callable[[Actor], None] = lambda _: None

    @contextmanager
    def installed(self) -> Iterator[VirtualRay]:
        """In the place of Ray, of the fleet's clock and of the engines' threads."""
        with ExitStack() as stack:
            ours = {name: getattr(self, name) for name in ("wait", "get", "kill", "cancel")}
            stack.enter_context(patch.multiple(ray, **ours))
            stack.enter_context(patch("rollout.fleet.monotonic", self._clock))
            stack.enter_context(patch("rollout.worker.ThreadPoolExecutor", EngineThread))
            stack.enter_context(patch("rollout.engine._params", lambda request, _: request))
            stack.callback(self._loop.close)
            stack.callback(self._forget_tasks)
            yield self

    def start(self, worker: int, scheme: QuantScheme) -> Actor:
        """`make_actor` of a fleet."""
        real = RolloutWorker(lambda _: engine_over(LLM(self._longest), self._blocks), worker)
        self.actors.append(Actor(self, real))
        return self.actors[-1]

    # What the driver calls

    def call(self, actor: Actor, method: str, *args: Any) -> Call:
        self.on_call(actor, method, args)
        if all(call.is_known for call in actor.calls):
            actor.heard = self.now
        result = getattr(actor.worker, method)(*args)
        if method == "stream":
            items = deque[Any]()
            task = self._loop.create_task(self._drain(actor, result, items))
            actor.calls.append(Stream(actor, method, args, task, items=items))
        else:
            task = self._loop.create_task(result)
            actor.calls.append(Call(actor, method, args, task))
        task.add_done_callback(lambda _: setattr(actor, "heard", self.now))
        self._settle()
        return actor.calls[-1]

    def wait(
        self, calls: Sequence[Call], num_returns: int = 1, timeout: float | None = None
    ) -> tuple[list[Call], list[Call]]:
        if timeout != 0:
            self.on_wait()
        return self._wait(calls, num_returns, timeout)

    def _wait(self, calls: Sequence[Call], num_returns: int, timeout: float | None) -> tuple[list[Call], list[Call]]:
        assert len(set(calls)) == len(calls) >= num_returns
        self._waits += 1
        assert self._waits < MOST_WAITS, "waits forever"
        until = math.inf if timeout is None else self.now + timeout
        for _ in range(self._rng.randint(0, MEANWHILE)):
            self._go_on()
        while sum(call.is_ready for call in calls) < num_returns and self.now < until:
            if not self._go_on():
                assert until < math.inf, "waits forever"
                self.now = until
        ended = [call for call in calls if call.is_ready][:num_returns]
        return ended, [call for call in calls if call not in ended]

    def get(self, call: Call | Item, timeout: float | None = None) -> Any:
        if isinstance(call, Item):
            if call.value is None:
                raise ActorDiedError
            call.stream.is_known = call.stream.taken == len(call.stream.args[0])
            return call.value
        ended, _ = self._wait([call], 1, timeout)
        if not ended:
            raise GetTimeoutError
        call.is_known = True
        if not call.task.done():
            raise ActorDiedError
        return call.task.result()

    def kill(self, actor: Actor) -> None:
        self.on_kill(actor)
        self._end(actor)

    def cancel(self, call: Call) -> None:
        call.is_known = True
        self._cancelled.append(call)

    # What happens

    def fail(self, actors: Iterable[Actor]) -> None:
        """One of these dies, or stops."""
        self._faults -= 1
        actor = self._rng.choice([actor for actor in actors if not actor.is_dead])
        if self._rng.random() < 0.5:
            self._end(actor)
        else:
            actor.is_stopped = True

    def _go_on(self) -> bool:
        """Let one thing happen; False when there is none."""
        living = [actor for actor in self.actors if not actor.is_dead and not actor.is_stopped]
        if self._faults and living and self._rng.randint(0, 19) == 19:
            self.fail(living)
            return True
        ways = [actor.thread.do_next for actor in living if actor.thread.calls]
        ways += [partial(self._hear, call) for call in self._cancelled]
        if not ways:
            return False
        self._rng.choice(ways)()
        self._settle()
        self.now += EVENT_S
        return True

    async def _drain(self, actor: Actor, stream: AsyncIterator[Any], items: deque[Any]) -> None:
        async for item in stream:
            items.append(item)
            actor.heard = self.now

    def _hear(self, call: Call) -> None:
        self._cancelled.remove(call)
        if not call.actor.is_stopped:
            call.task.cancel()

    def _end(self, actor: Actor) -> None:
        actor.is_dead = True
        actor.thread.calls.clear()

    def _forget_tasks(self) -> None:
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._settle()

    def _settle(self) -> None:
        for _ in range(TURNS):
            self._loop.call_soon(self._loop.stop)
            self._loop.run_forever()

    def _clock(self) -> float:
        self.now += 1e-6
        return self.now

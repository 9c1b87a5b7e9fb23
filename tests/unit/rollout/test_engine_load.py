"""A rollout worker whose weights come over a transfer engine keeps what it holds; vLLM is a double."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import nn

from qarl.errors import PublicationError
from qarl.quant.publish import publish
from qarl.quant.scheme import QuantScheme
from qarl.weights.source import Bucket, Manifest, PublishedWeights
from qarl.weights.wire import unpack
from rollout.engine import VLLMEngine

SCHEME = QuantScheme("none")


@dataclass
class LLM:
    received: Bucket = ()
    held: dict[str, Any] = field(default_factory=dict)

    def collective_rpc(self, method: str, args: tuple[Any, ...] = ()) -> list[Any]:
        if method == "qarl_take":
            self.held = dict(unpack(args[0]))
            return [[]]
        received, self.received = self.received, ()
        return [received]

    def reset_prefix_cache(self, reset_running_requests: bool = False) -> bool:
        return True


@dataclass
class Learner:
    """A source that can be read until the learner's next update."""

    whole: PublishedWeights
    reads: int = 0

    @property
    def manifest(self) -> Manifest:
        return self.whole.manifest

    def buckets(self) -> Iterator[Bucket]:
        self.reads += 1
        assert self.reads == 1
        return self.whole.buckets()


def test_a_worker_that_came_later_has_its_weights_when_the_next_are_refused() -> None:
    engine, llm = object.__new__(VLLMEngine), LLM()
    held = {"_held": None, "_loads": 0, "_read_back_every": 8, "_running": {}, "_keep_kv": False}
    vars(engine).update(held, _llm=llm, _receives=True, _scheme=SCHEME, _worker=1)
    model = nn.Linear(2, 2, bias=False)
    first = publish(model, SCHEME, 1)
    engine.load(Learner(first))  # nothing was sent to it: it asks the learner
    assert engine.version == 1
    old = model.weight.detach().clone()

    nn.init.ones_(model.weight)
    second = publish(model, SCHEME, 2)
    llm.received = tuple(replace(tensor, data=tensor.data + 1) for tensor in second.tensors)
    with pytest.raises(PublicationError, match=r"weight differs from its digest; version 1 is loaded again"):
        engine.load(Learner(second))
    assert engine.version == 1
    assert torch.equal(llm.held["weight"], old)

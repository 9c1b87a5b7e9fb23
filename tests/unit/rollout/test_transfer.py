"""Both ends of vLLM's transfer engines, apart from the wire."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from torch import Tensor
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

from qarl.errors import PublicationError
from qarl.quant.publish import BUCKET_BYTES, checkpoint_tensors, publish
from qarl.quant.scheme import QuantScheme, SchemeName
from qarl.weights.source import PublishedWeights
from qarl.weights.wire import to_host, unpack
from rollout.receive import Inbox
from rollout.send import PolicySource, Sender, Workers
from trainer.policy import Policy


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    yield
    ray.shutdown()


@pytest.mark.parametrize("format", ["w8a8_int8", "fp8_channel", "w4a16", "none"])
def test_what_is_sent_is_what_would_be_published(format: SchemeName, tiny_models: dict[str, Path]) -> None:
    scheme = QuantScheme(format)
    policy = Policy(tiny_models["qwen3"], torch.bfloat16, scheme, "stock", kernel="reference")
    source = PolicySource(lambda: checkpoint_tensors(policy.model), digests=True)
    inbox = Inbox()
    buffer = torch.empty(2**20, dtype=torch.uint8)
    for meta, (name, tensor) in zip(source.metadata(), source, strict=True):
        assert (meta.name, meta.dtype, meta.shape) == (name, tensor.dtype, tuple(tensor.shape))
        flat = tensor.reshape(-1).view(torch.uint8)
        view = buffer[: len(flat)].copy_(flat).view(tensor.dtype).view(tensor.shape)
        inbox.load_weights([(name, view)])  # as vLLM does: a view of a buffer that the next tensor will be in
    published = publish(policy.model, scheme, 3)
    assert tuple(source.digests) == published.manifest.tensors
    received = inbox.take()
    assert dict(unpack(PublishedWeights(published.manifest, received))).keys() == dict(source.digests).keys()
    assert inbox.take() == ()


def test_other_ranks_gather_but_digest_nothing() -> None:
    source = PolicySource(lambda: iter([("theta", torch.ones(3))]), digests=False)
    assert [name for name, _ in source] == ["theta"]
    assert source.digests == []


@pytest.mark.parametrize("elements", [8, BUCKET_BYTES])
def test_the_buffer_on_a_shared_gpu_holds_the_largest_tensor(elements: int) -> None:
    def tensors() -> Iterator[tuple[str, Tensor]]:
        yield "theta", torch.empty(elements, dtype=torch.bfloat16, device="meta")

    info: Any = Sender("ipc", 0, tensors)._init_info(1)
    assert (info.packed, info.packed_buffer_size_bytes) == (True, max(BUCKET_BYTES, 2 * elements))


class Taker:
    """A rollout worker that keeps the calls it gets."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def transfer(self, call: str, *request: dict[str, Any]) -> None:
        self.calls.append((call, *request))
        match request:
            case [{"update_info": "die"}]:
                os.kill(os.getpid(), signal.SIGKILL)
            case [{"update_info": "refuse"}]:
                raise ValueError("no such tensor\nand more")
            case [{"update_info": "wait"}]:
                time.sleep(600)

    def seen(self) -> list[tuple[Any, ...]]:
        return self.calls


def test_every_worker_has_a_rank_of_its_own(local_ray: None) -> None:
    takers = [ray.remote(Taker).options(num_cpus=0).remote() for _ in range(2)]
    workers = Workers(takers)
    workers.init_weight_transfer_engine({"rank_offset": 1, "world_size": 3})
    workers.start_weight_update()
    workers.update_weights({"names": ["theta"]})
    workers.finish_weight_update()
    first, second = ray.get([taker.seen.remote() for taker in takers])
    assert [calls[0][1]["init_info"]["rank_offset"] for calls in (first, second)] == [1, 2]
    update = ("update_weights", {"update_info": {"names": ["theta"]}})
    assert first[1:] == second[1:] == [("start_weight_update",), update, ("finish_weight_update",)]


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("die", "rollout worker 0: died during update_weights (ActorDiedError)"),
        ("refuse", "rollout worker 0: refused update_weights (ValueError: no such tensor)"),
    ],
)
def test_a_worker_that_fails_is_named(what: str, message: str, local_ray: None) -> None:
    workers = Workers([ray.remote(Taker).options(num_cpus=0).remote()])
    with pytest.raises(PublicationError) as caught:
        workers.update_weights(what)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_a_worker_that_dies_is_named_while_another_waits_for_it(local_ray: None) -> None:
    """As in a broadcast, which has no end for those that are left."""
    waiting, dying = (ray.remote(Taker).options(num_cpus=0).remote() for _ in range(2))
    workers = Workers([waiting, dying])
    with pytest.raises(PublicationError, match=r"^rollout worker 1: died during update_weights"):
        workers._call("update_weights", [({"update_info": what},) for what in ("wait", "die")])
    ray.kill(waiting)


def test_a_link_that_breaks_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def trainer_init(*args: object, **kwargs: object) -> None:
        raise RuntimeError("NCCL error: unhandled system error\nand more")

    monkeypatch.setattr(WeightTransferTrainerFactory, "trainer_init", trainer_init)
    sender = Sender("ipc", 0, lambda: iter([("theta", torch.ones(3))]))
    with pytest.raises(PublicationError) as caught:
        sender.send([object(), object()])
    assert str(caught.value) == (
        "ipc transfer to 2 rollout workers: RuntimeError: NCCL error: unhandled system error; "
        "NCCL_DEBUG=INFO tells more; rollout.transport=object_store goes without"
    )


def test_a_tensor_on_the_host_is_a_copy() -> None:
    tensor = torch.ones(3, dtype=torch.bfloat16)
    copied = to_host("theta", tensor)
    tensor.zero_()
    assert (copied.dtype, copied.data.tolist()) == ("bfloat16", [0x3F80] * 3)

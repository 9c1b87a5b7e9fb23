"""Both ends of vLLM's transfer engines, apart from the wire."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from torch import Tensor
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

from qarl.errors import PublicationError
from qarl.quant.publish import checkpoint_tensors, publish
from qarl.quant.scheme import QuantScheme, SchemeName
from qarl.weights.source import Channel, PublishedWeights, TransferStep
from qarl.weights.wire import BUCKET_BYTES, to_host, unpack
from rollout.receive import Inbox, connect, receive
from rollout.send import LearnerTensors, Sender, Workers
from tests.support.fakes import FakeReceiver
from trainer.policy import Policy


@pytest.mark.parametrize("format", ["w8a8_int8", "fp8_channel", "w4a16", "none"])
def test_what_is_sent_is_what_would_be_published(format: SchemeName, tiny_models: dict[str, Path]) -> None:
    scheme = QuantScheme(format)
    policy = Policy(tiny_models["qwen3"], torch.bfloat16, scheme, "stock", kernel="reference")
    source = LearnerTensors(lambda: checkpoint_tensors(policy.model), digests=True)
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
    source = LearnerTensors(lambda: iter([("theta", torch.ones(3))]), digests=False)
    assert [name for name, _ in source] == ["theta"]
    assert source.digests == []


@pytest.mark.parametrize("elements", [8, BUCKET_BYTES])
def test_the_buffer_on_a_shared_gpu_holds_the_largest_tensor(elements: int) -> None:
    def tensors() -> Iterator[tuple[str, Tensor]]:
        yield "theta", torch.empty(elements, dtype=torch.bfloat16, device="meta")

    info: Any = Sender("ipc", 0, tensors)._init_info(1)
    assert (info.packed, info.packed_buffer_size_bytes) == (True, max(BUCKET_BYTES, 2 * elements))


class FakeLLM:
    """Records the calls of vLLM's weight transfer API."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *request: self.calls.append((name, *request))


def start_worker() -> Any:
    return ray.remote(FakeReceiver).options(num_cpus=0).remote()


@pytest.mark.parametrize("settings", [{"rank_offset": 1, "world_size": 3}, {"packed": True}])
def test_every_worker_gets_vllms_calls_and_a_rank_of_its_own(settings: dict[str, int], local_ray: None) -> None:
    handles = [start_worker() for _ in range(2)]
    workers = Workers(handles)
    workers.init_weight_transfer_engine(settings)
    workers.start_weight_update()
    workers.update_weights({"names": ["theta"]})
    workers.finish_weight_update()
    ranks = [{"rank_offset": 1}, {"rank_offset": 2}] if "rank_offset" in settings else [{}, {}]
    for handle, rank in zip(handles, ranks, strict=True):
        llm: Any = FakeLLM()
        for order in ray.get(handle.orders.remote()):
            connect(llm, order) if isinstance(order, Channel) else receive(llm, order)
        assert llm.calls == [
            ("init_weight_transfer_engine", {"init_info": settings | rank}),
            ("start_weight_update",),
            ("update_weights", {"update_info": {"names": ["theta"]}}),
            ("finish_weight_update",),
        ]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (
            "die",
            "rollout worker 0: died during receive (was killed or crashed, perhaps by the system for lack of memory",
        ),
        ("refuse", "rollout worker 0: refused to receive (ValueError: no such tensor)"),
    ],
)
def test_a_worker_that_fails_is_named(fault: str, message: str, local_ray: None) -> None:
    workers = Workers([start_worker()])
    with pytest.raises(PublicationError) as caught:
        workers.update_weights({"fault": fault})
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_a_worker_that_dies_is_named_while_another_waits_for_it(local_ray: None) -> None:
    """As in a broadcast, which never ends for those that are left."""
    waiting, dying = start_worker(), start_worker()
    workers = Workers([waiting, dying])
    with pytest.raises(PublicationError, match=r"^rollout worker 1: died during receive"):
        workers._call("receive", [TransferStep("tensors", {"fault": fault}) for fault in ("wait", "die")])
    ray.kill(waiting)


def test_a_broken_connection_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def trainer_init(*args: object, **kwargs: object) -> None:
        raise RuntimeError("NCCL error: unhandled system error\nand more")

    monkeypatch.setattr(WeightTransferTrainerFactory, "trainer_init", trainer_init)
    sender = Sender("ipc", 0, lambda: iter([("theta", torch.ones(3))]))
    with pytest.raises(PublicationError) as caught:
        sender.send([object(), object()])
    assert str(caught.value) == (
        "ipc transfer to 2 rollout workers: RuntimeError: NCCL error: unhandled system error; "
        "NCCL_DEBUG=INFO shows more; rollout.transport=object_store goes without"
    )


def test_a_tensor_on_the_host_is_a_copy() -> None:
    tensor = torch.ones(3, dtype=torch.bfloat16)
    copied = to_host("theta", tensor)
    tensor.zero_()
    assert (copied.dtype, copied.data.tolist()) == ("bfloat16", [0x3F80] * 3)

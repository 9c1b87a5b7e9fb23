"""vLLM's own transfer engines, NCCL and CUDA IPC, on the side of the learner."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any, Literal

import ray
from ray.exceptions import RayTaskError
from torch import Tensor
from vllm.distributed.weight_transfer.base import (
    ParamMeta,
    TrainerInitInfo,
    TrainerWeightTransferEngine,
    WeightSource,
)
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

from qarl.errors import PublicationError
from qarl.quant.publish import BUCKET_BYTES
from qarl.remote import as_they_end, deaths, free_address
from qarl.weights.source import Tensors
from qarl.weights.wire import digest_of

Transport = Literal["nccl", "ipc"]


class Sender:
    """Sends the learner's tensors to rollout workers. On every learner rank; rank 0 has the wire.

    Args:
        transport: of `rollout.transport`.
        rank: of this process.
        tensors: (checkpoint name, tensor) in order, from the beginning at every call. Collective under ZeRO-3.
    """

    def __init__(self, transport: Transport, rank: int, tensors: Tensors) -> None:
        self._transport, self._rank = transport, rank
        self._source = PolicySource(tensors, digests=rank == 0)
        self._receivers: list[Any] = []
        self._engine: TrainerWeightTransferEngine[Any] | None = None

    def send(self, receivers: Sequence[Any]) -> list[tuple[str, str]]:
        """Send all tensors to the workers with these Ray handles; returns names and digests of what went out (rank 0).

        Raises:
            PublicationError: a worker died, or could not take what was sent; or the way to it broke.
        """
        try:
            if self._engine is None or self._receivers != list(receivers):
                # The group of before is left alone: to end a communicator, NCCL may wait for members that have died.
                self._engine = WeightTransferTrainerFactory.trainer_init(
                    self._init_info(len(receivers)), client=Workers(receivers), source=self._source
                )
                self._receivers = list(receivers)
            self._engine.send_weights()
        except RuntimeError as error:  # what NCCL, CUDA and the rendezvous raise
            raise PublicationError(
                f"{type(error).__name__}: {error}".splitlines()[0],
                where=f"{self._transport} transfer to {len(receivers)} rollout workers",
                mend="NCCL_DEBUG=INFO tells more; rollout.transport=object_store goes without",
            ) from error
        return self._source.digests

    def _init_info(self, workers: int) -> TrainerInitInfo:
        if self._transport == "ipc":
            largest = max(prod(meta.shape) * meta.dtype.itemsize for meta in self._source.metadata())
            buffer = max(BUCKET_BYTES, largest)  # it must hold every tensor whole
            return IPCTrainerInitInfo(rank=self._rank, packed=True, packed_buffer_size_bytes=buffer)
        host, _, port = free_address().rpartition(":")  # rank 0's counts
        # Not packed: packing puts many tensors in buffers of 1 GB; a broadcast for each costs microseconds.
        return NCCLTrainerInitInfo(host, int(port), world_size=1 + workers, packed=False, rank=self._rank)


class PolicySource(WeightSource):
    """The learner's tensors as vLLM's trainer engines read them, with the digests of what they were given."""

    def __init__(self, tensors: Tensors, digests: bool) -> None:
        self._tensors, self._digest = tensors, digests
        self._metadata: list[ParamMeta] = []
        self.digests: list[tuple[str, str]] = []

    def metadata(self) -> list[ParamMeta]:
        if not self._metadata:  # names, dtypes and shapes of a scheme do not change
            self._metadata = [ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self._tensors()]
        return self._metadata

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        self.digests = []
        for name, tensor in self._tensors():
            if self._digest:
                self.digests.append((name, digest_of(name, tensor)))
            yield name, tensor.contiguous()


class Workers:
    """vLLM's weight-sync client for rollout workers that are engines of their own.

    `RayVLLMWeightSyncClient` gives all handles one rank, as if they were replicas of one engine.
    """

    def __init__(self, handles: Sequence[Any]) -> None:
        self._handles = list(handles)

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        ranked: list[dict[str, Any]] = [dict(init_info) for _ in self._handles]
        for worker, info in enumerate(ranked):
            if "rank_offset" in info:
                info["rank_offset"] += worker
        self._call("init_weight_transfer_engine", [({"init_info": info},) for info in ranked])

    def start_weight_update(self) -> None:
        self._call("start_weight_update")

    def update_weights(self, update_info: Any) -> None:
        self._call("update_weights", [({"update_info": update_info},) for _ in self._handles])

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._call("finish_weight_update")

    def _call(self, method: str, args: Sequence[tuple[Any, ...]] = ()) -> None:
        each = args or [()] * len(self._handles)
        calls = enumerate(zip(self._handles, each, strict=True))
        running = {handle.transfer.remote(method, *arg): worker for worker, (handle, arg) in calls}
        for ended in as_they_end(list(running)):
            worker = running[ended]
            try:
                ray.get(ended)
            except RayTaskError as error:
                cause = f"{type(error.cause).__name__}: {error.cause}".splitlines()[0]
                raise PublicationError(f"refused {method} ({cause})", where=f"rollout worker {worker}") from error
            except deaths() as error:
                raise PublicationError(
                    f"died during {method} ({type(error).__name__})",
                    where=f"rollout worker {worker}",
                    mend="the same command continues from the last checkpoint",
                ) from error

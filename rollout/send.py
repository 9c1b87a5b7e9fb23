"""The learner's side of vLLM's transfer engines, NCCL and CUDA IPC."""

from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import Any

import ray
from ray.exceptions import RayTaskError
from torch import Tensor
from vllm.distributed.weight_transfer.base import ParamMeta, TrainerInitInfo, TrainerWeightTransferEngine
from vllm.distributed.weight_transfer.base import WeightSource as VLLMWeightSource
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

from qarl.errors import AGAIN, PublicationError
from qarl.remote import as_they_end, deaths, free_address, how_it_died
from qarl.weights.source import Channel, Tensors, TransferStep, Transport
from qarl.weights.wire import BUCKET_BYTES, digest_of


class Sender:
    """Sends the learner's tensors to rollout workers: a `WeightSender`. Every learner rank has one; only rank 0 sends.

    Args:
        transport: of `rollout.transport`.
        rank: of this process.
        tensors: what is sent, on all ranks the same.
    """

    def __init__(self, transport: Transport, rank: int, tensors: Tensors) -> None:
        self._transport, self._rank = transport, rank
        self._source = LearnerTensors(tensors, digests=rank == 0)
        self._workers: list[Any] = []
        self._engine: TrainerWeightTransferEngine[Any] | None = None

    def send(self, workers: Sequence[Any]) -> list[tuple[str, str]]:
        try:
            if self._engine is None or self._workers != list(workers):
                # The old group is not closed: NCCL may wait forever for members that have died.
                self._engine = WeightTransferTrainerFactory.trainer_init(
                    self._init_info(len(workers)), client=Workers(workers), source=self._source
                )
                self._workers = list(workers)
            self._engine.send_weights()
        except RuntimeError as error:  # of NCCL, CUDA or the rendezvous
            raise PublicationError(
                f"{type(error).__name__}: {error}".splitlines()[0],
                where=f"{self._transport} transfer to {len(workers)} rollout workers",
                hint="NCCL_DEBUG=INFO shows more; rollout.transport=object_store goes without",
            ) from error
        return self._source.digests

    def _init_info(self, workers: int) -> TrainerInitInfo:
        if self._transport == "ipc":
            largest = max(prod(meta.shape) * meta.dtype.itemsize for meta in self._source.metadata())
            buffer = max(BUCKET_BYTES, largest)  # no tensor may be larger than the buffer
            return IPCTrainerInitInfo(rank=self._rank, packed=True, packed_buffer_size_bytes=buffer)
        host, _, port = free_address().rpartition(":")  # only rank 0 uses it
        # Not packed: packing needs buffers of 1 GB, and a broadcast for each tensor costs microseconds.
        return NCCLTrainerInitInfo(host, int(port), world_size=1 + workers, packed=False, rank=self._rank)


class LearnerTensors(VLLMWeightSource):
    """The learner's tensors as vLLM's trainer engines read them; keeps the digests of the tensors that it gave out."""

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
    """The rollout workers as vLLM's trainer engines call them (a `VLLMWeightSyncClient`).

    vLLM's own `RayVLLMWeightSyncClient` gives all workers one rank, as if they were replicas of one engine.
    """

    def __init__(self, handles: Sequence[Any]) -> None:
        self._handles = list(handles)

    def init_weight_transfer_engine(self, init_info: Mapping[str, Any]) -> None:
        self._call("connect", [Channel(worker, init_info) for worker in range(len(self._handles))])

    def start_weight_update(self) -> None:
        self._receive(TransferStep("begin"))

    def update_weights(self, update_info: Mapping[str, Any]) -> None:
        self._receive(TransferStep("tensors", update_info))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._receive(TransferStep("end"))

    def _receive(self, step: TransferStep) -> None:
        self._call("receive", [step] * len(self._handles))

    def _call(self, method: str, arguments: Sequence[Channel | TransferStep]) -> None:
        """Call every worker with its argument, all at once."""
        calls = [getattr(handle, method).remote(arg) for handle, arg in zip(self._handles, arguments, strict=True)]
        for ended in as_they_end(calls):
            where = f"rollout worker {calls.index(ended)}"
            try:
                ray.get(ended)
            except RayTaskError as error:
                cause = f"{type(error.cause).__name__}: {error.cause}".splitlines()[0]
                raise PublicationError(f"refused to {method} ({cause})", where) from error
            except deaths() as error:
                raise PublicationError(f"died during {method} ({how_it_died(error)})", where, AGAIN) from error

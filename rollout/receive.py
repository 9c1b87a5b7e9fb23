"""A rollout worker's side of vLLM's transfer engines, NCCL and CUDA IPC.

vLLM's own engines write each tensor straight into the model. These put it into host memory: the model must not change
before the tensors are checked against their manifest, and the engine must be able to load them again later.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import Tensor
from vllm.config.weight_transfer import WeightTransferConfig
from vllm.distributed.weight_transfer.base import WeightTransferEngine
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine

from qarl.weights.source import Bucket, Channel, PublishedTensor, TransferStep, Transport
from qarl.weights.wire import to_host

if TYPE_CHECKING:
    from vllm import LLM


class Inbox:
    """Where received tensors wait; to vLLM's transfer engines it looks like the model."""

    def __init__(self) -> None:
        self._tensors: list[PublishedTensor] = []

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        # A copy: vLLM may give a view of a buffer, and write the next tensors into that buffer.
        self._tensors += [to_host(name, tensor) for name, tensor in weights]

    def take(self) -> Bucket:
        """Remove and return the tensors received since the transfer began."""
        taken, self._tensors = tuple(self._tensors), []
        return taken


class Receiver(WeightTransferEngine):
    """A transfer engine of vLLM that puts what it receives into `inbox`."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.inbox = Inbox()

    def start_weight_update(self) -> None:
        self.inbox = Inbox()
        self.set_weight_update_target(self.inbox, self.model_config)

    def finish_weight_update(self) -> None:
        """Nothing to do: the model is unchanged."""


class NCCLReceiver(Receiver, NCCLWeightTransferEngine):
    """The learner's rank 0 broadcasts tensor by tensor to all rollout workers."""


class IPCReceiver(Receiver, IPCWeightTransferEngine):
    """Reads from the learner's buffer on the GPU that worker and learner share."""

    def finish_weight_update(self) -> None:
        self.shutdown()  # releases the learner's buffer


RECEIVERS: dict[Transport, type[Receiver]] = {"nccl": NCCLReceiver, "ipc": IPCReceiver}
for _transport, _receiver in RECEIVERS.items():
    WeightTransferEngineFactory.register_engine(f"qarl_{_transport}", _receiver)


def transfer_settings(transport: Transport) -> dict[str, Any]:
    """Arguments of `vllm.LLM` for an engine that receives over `transport`."""
    return {"weight_transfer_config": WeightTransferConfig(backend=f"qarl_{transport}")}


def connect(llm: LLM, channel: Channel) -> None:
    """Connect an engine to the learner. NCCL waits until the learner and all workers have connected."""
    settings = dict(channel.settings)
    if "rank_offset" in settings:  # NCCL: each worker has a rank of its own, after the learner's
        settings["rank_offset"] += channel.worker
    llm.init_weight_transfer_engine({"init_info": settings})


def receive(llm: LLM, step: TransferStep) -> None:
    """Take one step of a transfer; the tensors go to the inbox."""
    if step.kind == "begin":
        llm.start_weight_update()
    elif step.kind == "tensors":
        llm.update_weights({"update_info": dict(step.tensors)})
    else:
        llm.finish_weight_update()

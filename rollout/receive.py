"""vLLM's own transfer engines, NCCL and CUDA IPC, on the side of a rollout worker.

vLLM's load what arrives into the model at once. Here it goes to host memory first: nothing may touch the model before
it is what its manifest says, and what the engine holds must be there to be loaded again.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from vllm.distributed.weight_transfer.base import WeightTransferEngine
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine

from qarl.weights.source import Bucket, PublishedTensor
from qarl.weights.wire import to_host


class Inbox:
    """Stands where vLLM's transfer engine expects the model."""

    def __init__(self) -> None:
        self._tensors: list[PublishedTensor] = []

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        # Copied: what vLLM hands out may be a view of a buffer that the next tensors come in.
        self._tensors += [to_host(name, tensor) for name, tensor in weights]

    def take(self) -> Bucket:
        """What came since the update started; empty when it was taken, or when none did."""
        taken, self._tensors = tuple(self._tensors), []
        return taken


class Receiver(WeightTransferEngine):
    """A transfer engine of vLLM's whose updates end in `inbox`."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.inbox = Inbox()

    def start_weight_update(self) -> None:
        self.inbox = Inbox()
        self.set_weight_update_target(self.inbox, self.model_config)

    def finish_weight_update(self) -> None:
        """Nothing to do: the model has not been touched."""


class NCCLReceiver(Receiver, NCCLWeightTransferEngine):
    """Broadcast by the learner's first rank to all rollout workers, tensor by tensor."""


class IPCReceiver(Receiver, IPCWeightTransferEngine):
    """Read from the learner's buffer on the GPU that both share."""

    def finish_weight_update(self) -> None:
        self.shutdown()  # lets go of the learner's buffer


BACKENDS = {"nccl": NCCLReceiver, "ipc": IPCReceiver}
"""By `rollout.transport`; vLLM knows them as `qarl_nccl` and `qarl_ipc`."""
for _name, _engine in BACKENDS.items():
    WeightTransferEngineFactory.register_engine(f"qarl_{_name}", _engine)


def transfer_settings(transport: str) -> dict[str, Any]:
    """Arguments of `vllm.LLM` for an engine that receives over `transport`, a key of `BACKENDS`."""
    from vllm.config.weight_transfer import WeightTransferConfig

    return {"weight_transfer_config": WeightTransferConfig(backend=f"qarl_{transport}")}

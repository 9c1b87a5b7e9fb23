"""vLLM's NCCL transfer engines on a machine without GPUs: what they broadcast goes through their rendezvous' store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class Wire:
    """In place of vLLM's NCCL communicator. Where `damage` exists, a tensor arrives with a flipped bit."""

    def __init__(self, group: Any, damage: Path) -> None:
        self._group, self._damage = group, damage

    def broadcast(self, tensor: Tensor, src: int, stream: object) -> None:
        sent = self._group.broadcast(tensor, src)
        if self._group.rank != src:
            tensor.copy_(sent)
            if self._damage.exists():
                self._damage.unlink()
                tensor.view(torch.uint8).flatten()[0] ^= 1


def without_gpus(damage: Path) -> None:
    """Put `Wire` in this process in place of NCCL, and what the engines ask of a CUDA device out of the way."""
    import vllm.distributed.weight_transfer.nccl_common as nccl
    from vllm.distributed.utils import StatelessProcessGroup

    def connect(host: str, port: int, rank: int, world_size: int, device: object) -> Wire:
        return Wire(StatelessProcessGroup.create(host=host, port=port, rank=rank, world_size=world_size), damage)

    def nothing() -> Any:
        return None

    nccl.stateless_init_process_group = connect
    torch.cuda.current_stream = nothing  # type: ignore[assignment]
    torch.accelerator.current_device_index = nothing
    torch.accelerator.synchronize = nothing  # type: ignore[assignment]

"""vLLM's worker for one process of a tensor-parallel engine on CPU, which vLLM starts by this class's name."""

from typing import Any

from vllm.v1.worker.cpu_worker import CPUWorker

from qarl.numerics.vllm_patch import patch_cpu, patch_cpu_engine


class CPUShard(CPUWorker):
    """With the changes that the rollout worker's process has when the engine is in it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        patch_cpu()
        patch_cpu_engine()
        super().__init__(*args, **kwargs)

"""What vLLM is told of a run's config."""

from typing import Any

from qarl.config.policy import RolloutConfig
from qarl.numerics.engine_ops import BLOCK_SIZE


def engine_settings(config: RolloutConfig, device: str, sleeps: bool) -> dict[str, Any]:
    """Arguments of `vllm.LLM` for an engine on `device`, but its model and dtype. `sleeps`: as for `VLLMEngine`."""
    settings: dict[str, Any] = {
        "load_format": "dummy",
        "enforce_eager": device == "cpu",
        "max_model_len": config.max_model_len,
        "max_num_seqs": config.max_num_seqs,
        "max_num_batched_tokens": max(config.max_num_batched_tokens, config.max_model_len),
        "logprobs_mode": "processed_logprobs",
        "worker_extension_cls": "rollout.loader.WeightLoader",
        "disable_log_stats": True,
        "enable_sleep_mode": sleeps,
        "seed": 0,
    }
    if device == "cpu":
        # No chunked prefill: vLLM's CPU sampler loses a request's seed between chunks of its prompt.
        settings |= {"block_size": BLOCK_SIZE, "enable_chunked_prefill": False}
    else:
        settings["gpu_memory_utilization"] = config.gpu_memory_utilization
    if config.keep_kv:
        # Nothing may read old keys from a prefix cache, and no token may be under way when weights come.
        settings |= {"enable_prefix_caching": False, "async_scheduling": False}
    if config.transport != "object_store":
        from rollout.receive import transfer_settings

        settings |= transfer_settings(config.transport)
    if config.tensor_parallel_size > 1:  # the engine's processes, which this one only schedules
        settings |= {"tensor_parallel_size": config.tensor_parallel_size, "distributed_executor_backend": "mp"}
        settings |= {"worker_cls": "rollout.shard.CPUShard"} if device == "cpu" else {}
    return settings

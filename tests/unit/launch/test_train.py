"""What a run says at its start."""

from __future__ import annotations

from pathlib import Path

from launch.train import _Job
from qarl.config.io import load_config
from qarl.types import WorkerInfo

QUICKSTART = Path(__file__).parents[3] / "configs" / "quickstart.yaml"


def test_a_worker_with_room_for_fewer_sequences_says_so() -> None:
    lines: list[str] = []
    job = object.__new__(_Job)
    job._config, job._log = load_config(QUICKSTART, ["rollout.max_num_seqs=64"]), lines.append
    job._log_workers([WorkerInfo(number, "cpu", ("Kernel",), "vm", 1, fit) for number, fit in enumerate((64, 12))])
    assert lines == [
        "rollout worker 0: vLLM on cpu (vm), w8a8_int8, Kernel",
        "rollout worker 1: vLLM on cpu (vm), w8a8_int8, Kernel",
        "rollout worker 1: its KV cache holds 12 sequences of rollout.max_model_len, fewer than "
        "rollout.max_num_seqs 64; others wait (a larger rollout.kv_cache_gib holds more)",
    ]

"""What a run says at its start."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

import pytest

from launch.train import _Job, train
from qarl.config.io import load_config
from qarl.errors import DataError
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
        "rollout.max_num_seqs 64; others wait (a larger rollout.kv_cache_gib holds more; "
        "with rollout.max_num_seqs=12 they wait for any worker)",
    ]


def test_a_start_shows_machine_packages_and_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> NoReturn:
        raise DataError("far enough")

    monkeypatch.setattr("launch.train.load_prompts", stop)
    lines: list[str] = []
    settings = ["rollout.num_workers=2", "learner.num_threads=3", "cluster.device=cpu", f"run.dir={tmp_path}"]
    light = ["rollout.num_cpus_per_worker=0.1", "learner.num_cpus_per_rank=0.1"]
    with pytest.raises(DataError, match="far enough"):
        train(load_config(QUICKSTART, [*settings, *light, "learner.num_ranks=1"]), lines.append)
    assert lines[0].startswith("machine: ")
    assert lines[1].startswith("packages: ")
    assert lines[2:] == ["learner: 1 rank x 3 threads, 2 rollout workers x 1 thread"]

"""A real rollout actor, killed in mid-generation: the step finishes with the samples it would have had.

Slow, since two others show it together: tests/unit/rollout/test_fleet.py with small engines, and
`test_deaths_and_interrupts_do_not_change_the_run` with a real run.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ray
import torch

from launch.cluster.connect import connect
from launch.cluster.placement import Placement
from qarl.config.io import load_config
from qarl.config.run import Config
from qarl.quant.publish import publish, write_engine_config
from qarl.quant.scheme import QuantScheme
from qarl.types import Prompt, SampleRequest
from rollout.fleet import RayFleet
from tests.support.fakes import FakeProver
from trainer.policy import Policy

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


@pytest.fixture
def config(tiny_models: dict[str, Path]) -> Config:
    overrides = [f"model.path={tiny_models['qwen3']}", "rollout.max_model_len=768", "rollout.max_restarts=1"]
    overrides += ["rollout.num_workers=1", "learner.num_ranks=1"]
    return load_config(ROOT / "configs" / "quickstart.yaml", overrides)


@pytest.fixture
def notes() -> list[str]:
    return []


@pytest.fixture
def fleet(config: Config, notes: list[str], tmp_path: Path) -> Iterator[RayFleet]:
    write_engine_config(tmp_path, Path(config.model.path), QuantScheme())
    connect(config)
    fleet = Placement(config, "cpu", tmp_path / "logs").start_fleet(lambda _: tmp_path, QuantScheme(), notes.append)
    yield fleet
    fleet.close()
    ray.shutdown()


def test_a_killed_actor_costs_time_only(fleet: RayFleet, config: Config, notes: list[str], tmp_path: Path) -> None:
    policy = Policy(config.model.path, torch.bfloat16, QuantScheme(), "stock")
    (info,) = fleet.infos()
    requests = [SampleRequest(Prompt(str(i), "", "", (1, 4 + i % 8)), i, 1.0, 700) for i in range(64)]
    prover = FakeProver([replace(request, max_new_tokens=8) for request in requests[:2]])
    fleet.load(publish(policy.model, QuantScheme(), 7), prover)
    undisturbed = fleet.sample(requests)
    log = tmp_path / "logs" / "worker-0.log"
    before = log.read_text()

    killer = threading.Timer(0.7, os.kill, (info.pid, signal.SIGKILL))
    started = time.monotonic()
    killer.start()
    samples = fleet.sample(requests)
    assert time.monotonic() - started > 0.7, "the samples were there before the kill"
    assert len(notes) == 1
    assert "rollout worker 0 died during generate" in notes[0]
    assert f"its log {log} ends with: " in notes[0]
    assert "INFO rollout.worker: samples 1 requests; replacing it" in notes[0]
    assert "vllm" in before.lower()
    assert log.read_text().startswith(before), "the replacement appends"
    assert fleet.infos()[0].pid != info.pid
    assert {sample.version for sample in samples} == {7}
    # The replacement was judged, on what its predecessor had sampled.
    (version, before), (again, after) = prover.judged
    assert (version, again, list(after)) == (7, 7, [0])
    assert [s.logprobs_T.tolist() for s in after[0]] == [s.logprobs_T.tolist() for s in before[0]]
    for sample, reference in zip(samples, undisturbed, strict=True):
        assert sample.response_ids == reference.response_ids
        assert np.array_equal(sample.logprobs_T, reference.logprobs_T)

"""The engine on CUDA: batch invariance, sleep, transfer. `pytest -m gpu tests/integration/test_engine_gpu.py`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import ray
import torch

from launch.cluster.connect import connect
from launch.cluster.placement import Placement
from qarl.config.io import load_config
from qarl.config.policy import RolloutConfig
from qarl.config.schedule import scheme_at
from qarl.quant.publish import write_engine_config
from rollout.engine import engine_env
from tests.support.transfer import Run

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parents[2]

SAMPLED_TOGETHER_AND_ALONE = """
import sys
from pathlib import Path
import numpy as np, torch
from qarl.config.policy import RolloutConfig
from qarl.mismatch import Mismatch
from qarl.quant.publish import publish, write_engine_config
from qarl.quant.scheme import QuantScheme
from qarl.types import Prompt, SampleRequest, TrainSequence
from rollout.engine import VLLMEngine
from trainer.batching import Batch
from trainer.policy import Policy

source, folder, scheme = Path(sys.argv[1]), Path(sys.argv[2]), QuantScheme(sys.argv[3])
write_engine_config(folder, source, scheme)
engine = VLLMEngine(folder, RolloutConfig(max_model_len=256, batch_invariant=True), scheme, "bfloat16", "cuda")
policy = Policy(source, torch.bfloat16, scheme, "portable", device=torch.device("cuda"))
engine.load(publish(policy.model, scheme, 1))
rng = np.random.default_rng(0)
prompts = [tuple(map(int, rng.integers(4, 256, rng.integers(3, 40)))) for _ in range(32)]
asked = [SampleRequest(Prompt(str(i), "", "", ids), i, 1.0, 60) for i, ids in enumerate(prompts)]
together = engine.generate(asked)
for request, sample in list(zip(asked, together))[:4]:
    (alone,) = engine.generate([request])
    assert alone.response_ids == sample.response_ids
    assert np.array_equal(alone.logprobs_T, sample.logprobs_T)
sequences = [TrainSequence(s.prompt.token_ids, s.response_ids, s.logprobs_T) for s in together]
with torch.no_grad():
    logp_BT = policy(Batch.of(sequences, policy.device)).logprobs_BT.cpu().numpy()
rows = [logp_BT[row, : len(s.response_ids)] for row, s in enumerate(together)]
print("GAP", Mismatch.between(rows, [s.logprobs_T for s in together]).abs_mean)
"""


SAMPLED_BEFORE_AND_AFTER_A_SLEEP = """
import sys
from pathlib import Path
import numpy as np, torch
from qarl.config.policy import RolloutConfig
from qarl.quant.publish import publish, write_engine_config
from qarl.quant.scheme import QuantScheme
from qarl.types import Prompt, SampleRequest
from rollout.engine import VLLMEngine
from trainer.policy import Policy

source, folder, scheme = Path(sys.argv[1]), Path(sys.argv[2]), QuantScheme(sys.argv[3])
write_engine_config(folder, source, scheme)
config = RolloutConfig(max_model_len=256, batch_invariant=scheme.name != "w4a16", gpu_memory_utilization=0.3)
engine = VLLMEngine(folder, config, scheme, "bfloat16", "cuda", sleeps=True)
policy = Policy(source, torch.bfloat16, scheme, "portable", device=torch.device("cuda"))
engine.load(publish(policy.model, scheme, 1))
asked = [SampleRequest(Prompt(str(i), "", "", (4, 5, 6 + i)), i, 1.0, 60) for i in range(8)]
first = engine.generate(asked)
for version in (1, 2):
    torch.cuda.empty_cache()
    awake, total = torch.cuda.mem_get_info()
    engine.sleep()
    asleep, _ = torch.cuda.mem_get_info()
    assert asleep - awake > 0.2 * total, (awake, asleep, total)
    engine.wake()
    if version == 2:
        engine.load(publish(policy.model, scheme, 2))
    again = engine.generate(asked)
    assert [s.version for s in again] == [version] * len(asked)
    for one, other in zip(first, again):
        assert one.response_ids == other.response_ids
        assert np.array_equal(one.logprobs_T, other.logprobs_T)
print("SAME")
"""


@pytest.mark.parametrize("scheme", ["none", "w8a8_int8", "w4a16"])
def test_an_engine_that_sleeps_gives_its_memory_back_and_wakes_as_it_was(
    scheme: str, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    """With the weights that it had, and then with those of a publication."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    env = {**os.environ, **engine_env("cuda", RolloutConfig(batch_invariant=scheme != "w4a16"))}
    command = [sys.executable, "-c", SAMPLED_BEFORE_AND_AFTER_A_SLEEP, str(tiny_models["qwen3"]), str(tmp_path), scheme]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "SAME" in done.stdout


@pytest.mark.parametrize("scheme", ["none", "w8a8_int8"])
def test_batch_invariant_engine_samples_alike_in_any_batch(
    scheme: str, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    """And the portable learner on the same device is near: its sums run in another order."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    env = {**os.environ, **engine_env("cuda", RolloutConfig(batch_invariant=True))}  # vLLM reads it at its import
    command = [sys.executable, "-c", SAMPLED_TOGETHER_AND_ALONE, str(tiny_models["qwen3"]), str(tmp_path), scheme]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("GAP"))
    assert float(line.split()[1]) < 0.05


@pytest.mark.parametrize("name", ["w8a8_int8", "w4a16"])
@pytest.mark.parametrize(("transport", "gpus"), [("ipc", 1), ("nccl", 2)])
def test_weights_over_vllms_transfer_engine(
    transport: str, gpus: int, name: str, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    if torch.cuda.device_count() < gpus:
        pytest.skip(f"needs {gpus} CUDA devices")
    overrides = (
        *(f"model.path={tiny_models['qwen3']}", f"rollout.transport={transport}", "cluster.device=cuda"),
        *(f"cluster.colocate={str(transport == 'ipc').lower()}", "rollout.gpu_memory_utilization=0.3"),
        *(f"rollout.scheme={name}", "learner.optimizer.lr=1.0e-3"),
    )
    config = load_config(ROOT / "configs" / "quickstart.yaml", overrides)
    scheme = scheme_at(config.rollout, 1)
    write_engine_config(tmp_path / "engine", tiny_models["qwen3"], scheme)
    connect(config)
    placement = Placement(config, "cuda", tmp_path / "logs")
    fleet = placement.start_fleet(lambda _: tmp_path / "engine", scheme, print)
    run = Run(fleet, placement.start_learner(fleet.receivers), tmp_path / "damage", [])
    try:
        for version in (1, 2):
            samples = run.publish(version)
            assert max(run.gaps(samples, version)) < 0.5  # kernels of their own
            run.learn(samples)
    finally:
        ray.shutdown()

"""vLLM's NCCL transfer from a real learner to real engines in Ray actors; only the wire between them is a double."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import ray

from launch.cluster.placement import make_weight_sender
from qarl.config.io import load_config
from qarl.config.run import Config
from qarl.errors import PublicationError
from qarl.quant.publish import write_engine_config
from qarl.quant.scheme import QuantScheme
from qarl.remote import free_address
from rollout.engine import VLLMEngine, engine_env
from rollout.fleet import RayFleet
from rollout.worker import RolloutWorker
from tests.support.fakes import wait_until_gone
from tests.support.transfer import REQUESTS, Run
from tests.support.wire import without_gpus
from trainer.learner import LearnerRank, learner_env
from trainer.ranks import LearnerGroup

ROOT = Path(__file__).parents[2]
SCHEME = QuantScheme()


class Rank(LearnerRank):
    def start(self) -> None:
        without_gpus(Path("nowhere"))
        super().start()


def make_engine(config: Config, folder: Path, damage: Path, worker: int) -> VLLMEngine:
    without_gpus(damage / str(worker))
    return VLLMEngine(folder, config.rollout, SCHEME, "bfloat16", "cpu", worker)


@pytest.fixture
def run(tiny_models: dict[str, Path], tmp_path: Path) -> Iterator[Run]:
    overrides = (f"model.path={tiny_models['qwen3']}", "rollout.transport=nccl", "learner.optimizer.lr=1.0e-3")
    config = load_config(ROOT / "configs" / "quickstart.yaml", overrides)
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="error")
    folder, damage, notes = tmp_path / "engine", tmp_path / "damage", list[str]()
    damage.mkdir()
    write_engine_config(folder, tiny_models["qwen3"], SCHEME)
    master = ray.get(ray.remote(free_address).options(num_cpus=0).remote())

    def actor(kind: Callable[..., object], env: dict[str, str]) -> object:
        return ray.remote(kind).options(num_cpus=0, runtime_env={"env_vars": env})

    def make_actor(worker: int, scheme: QuantScheme) -> object:
        env = engine_env("cpu", config.rollout)
        return actor(RolloutWorker, env).remote(partial(make_engine, config, folder, damage), worker)

    fleet = RayFleet(make_actor, SCHEME, 2, 64, 600.0, 3, notes.append)
    rank = actor(Rank, learner_env("cpu", 1)).remote(config, "cpu", 0, 1, master, partial(make_weight_sender, "nccl"))
    yield Run(fleet, LearnerGroup([rank], transfer=fleet.receivers), damage, notes)
    ray.shutdown()


@pytest.mark.slow
def test_weights_over_vllms_transfer_engine(run: Run) -> None:
    samples = run.publish(1)
    run.check(samples, 1)
    run.learn(samples)
    run.check(run.publish(2), 2)

    # A worker that comes later has its weights from the learner ...
    dying = run.fleet.infos()[1].pid
    ray.kill(run.fleet.actors[1])
    wait_until_gone(dying)
    samples = run.fleet.sample(REQUESTS)
    run.check(samples, 2)
    assert run.notes[0].startswith("rollout worker 1 died during generate")

    # ... keeps them when the learner has gone on, and a bit flips on the way of the next version ...
    run.learn(samples)
    (run.damage / "1").touch()
    with pytest.raises(PublicationError, match="differs from its digest") as caught:
        run.publish(3)
    assert caught.value.where == "rollout worker 1, weights version 3"
    assert caught.value.hint == "version 2 is loaded again"

    # ... and is one of those that the version after it is sent to.
    run.check(run.publish(4), 4)

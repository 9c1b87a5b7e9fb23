"""Any ZeRO stage and number of ranks gives one curve, and a run goes on with another number of ranks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import ray

from qarl.errors import CheckpointError
from qarl.mismatch import Logprobs
from tests.support.learners import State, config_of, sequences, start, state_of, with_prox
from trainer.deepspeed_files import TAG
from trainer.ranks import LearnerGroup

pytestmark = pytest.mark.slow
STAGES = [
    ("float32", 0),
    ("float32", 1),
    ("float32", 2),
    ("float32", 3),
    ("bfloat16", 1),
    ("bfloat16", 2),
    ("bfloat16", 3),
]
BATCH = sequences(8)
PROX = [np.full(len(sequence.response_ids), -3.0, np.float32) for sequence in BATCH]


@pytest.fixture(scope="module", autouse=True)
def local_ray() -> Iterator[None]:
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="error")
    yield
    ray.shutdown()


def learn(learner: LearnerGroup, updates: int) -> tuple[list[list[Logprobs]], list[float]]:
    """Log-probs after each update, and the norms of the gradients before they were clipped."""
    scores, norms = [], []
    for _ in range(updates):
        norms.append(learner.update([with_prox(BATCH, PROX)]).metrics["actor/grad_norm"])
        scores.append(learner.score(BATCH))
    return scores, norms


def largest(ours: list[Logprobs], theirs: list[Logprobs]) -> float:
    return max(float(np.abs(a - b).max()) for a, b in zip(ours, theirs, strict=True))


def check_same(ours: State, theirs: State) -> None:
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not np.array_equal(ours[name], theirs[name])] == []


def tolerance(dtype: str) -> float:
    """Of log-probs, in nats: the order of sums differs, and bfloat16 rounds each rank's gradient.

    In full precision: a low-bit grid would round the last bits of a sum to another code now and then.
    """
    return 2e-3 if dtype == "float32" else 0.1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_stage_and_number_of_ranks_gives_one_curve(dtype: str, tiny_models: dict[str, Path]) -> None:
    curves, norms = {}, []
    for stage in [stage for of, stage in STAGES if of == dtype]:
        for ranks in (1, 2):
            more = (f"model.dtype={dtype}", "rollout.scheme=none")
            learner = start(config_of(tiny_models["qwen3"], stage, ranks, *more))
            before, (after, grad_norms) = learner.score(BATCH), learn(learner, 4)
            curves[stage, ranks] = [before, *after]
            norms.append(grad_norms)
            learner.close()
    first, *others = curves.values()
    assert largest(first[0], first[-1]) > 10 * tolerance(dtype)  # it has moved
    assert norms[1:] == [pytest.approx(norms[0], rel=2e-2)] * (len(norms) - 1)
    for curve in others:
        assert largest(first[0], curve[0]) == 0.0
        assert max(largest(*pair) for pair in zip(first, curve, strict=True)) < tolerance(dtype)


@pytest.mark.parametrize(("dtype", "stage"), STAGES)
def test_a_run_goes_on_with_another_number_of_ranks(
    dtype: str, stage: int, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    """Two ranks, then one, then two, beside two that were never interrupted.

    Masters, moments, step and rate stay the same bits; what is learned after is within the tolerance.
    """
    folders = [tmp_path / f"step_{number}" / "learner" for number in (2, 3)]
    for folder in folders:
        folder.mkdir(parents=True)

    def begin(ranks: int) -> LearnerGroup:
        return start(config_of(tiny_models["qwen3"], stage, ranks, f"model.dtype={dtype}", "rollout.scheme=none"))

    two = begin(2)
    learn(two, 2)
    two.save(str(folders[0]))
    saved, digest, state = two.score(BATCH), two.publish(1).manifest.digest, state_of(two)
    assert state["lr"] == np.float32(0.75e-3)  # of the next step, within the warm-up
    assert state["step"].tolist() == [2]
    undisturbed, _ = learn(two, 2)
    two.close()

    one = begin(1)
    one.load(str(folders[0]))
    assert largest(one.score(BATCH), saved) == 0.0
    assert one.publish(1).manifest.digest == digest
    check_same(state_of(one), state)
    (after,), _ = learn(one, 1)
    assert largest(after, undisturbed[0]) < tolerance(dtype)
    one.save(str(folders[1]))
    digest, state = one.publish(1).manifest.digest, state_of(one)
    one.load(str(folders[1]))  # of as many ranks
    assert one.publish(1).manifest.digest == digest
    one.close()

    again = begin(2)
    again.load(str(folders[1]))
    assert again.publish(1).manifest.digest == digest
    check_same(state_of(again), state)
    assert again.update([with_prox(BATCH, PROX)]).metrics["actor/lr"] == pytest.approx(1e-3)  # the end of the warm-up
    assert largest(again.score(BATCH), undisturbed[1]) < tolerance(dtype)
    for file in (folders[1] / TAG).glob("*_optim_states.pt"):
        file.write_bytes(file.read_bytes()[:1000])
        with pytest.raises(CheckpointError, match=r"cannot be cut .* learner\.num_ranks=1"):
            again.load(str(folders[1]))
    again.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_2", "step_3"]

"""The learner ranks as one learner, over real Ray actors: merging, publication, errors."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import ray

from qarl.errors import AGAIN, ActorError, CheckpointError, KernelError, ModelError, PublicationError, QarlError
from qarl.protocols import UpdateResult
from qarl.types import Activity, TrainSequence
from tests.support.fakes import BROKEN, NO_MODEL, FakeRank, make_weights
from trainer.ranks import LearnerGroup
from trainer.weights import SentWeights

pytestmark = pytest.mark.usefixtures("local_ray")


def start(fault: str = "") -> LearnerGroup:
    actor = ray.remote(FakeRank).options(num_cpus=0)
    return LearnerGroup([actor.remote(rank, 2, fault) for rank in range(2)])


@pytest.fixture(scope="module")
def group(local_ray: None) -> Iterator[LearnerGroup]:
    """For all tests that leave its processes alive and idle."""
    made = start()
    yield made
    made.close()


@pytest.fixture
def lost() -> Iterator[LearnerGroup]:
    """For a test after which nobody can use it."""
    made = start()
    yield made
    made.close()


def test_ranks_are_one_learner(group: LearnerGroup) -> None:
    sequences = [TrainSequence((1,), (i, i + 1), np.zeros(2, np.float32)) for i in range(5)]
    assert [row.tolist() for row in group.score(sequences)] == [[-i, -i - 1] for i in range(5)]
    assert [row.tolist() for row in group.score(sequences[:1], aligned=False)] == [[0, -2]]
    assert group.score([]) == []
    assert group.update([sequences]) == UpdateResult({"loss": 1.0, "size": 1.0}, 0.25)
    with pytest.raises(ValueError, match="zero-size array"):
        group.update([])  # no rank has measured the ratios
    weights = group.publish(7)
    assert weights.manifest.version == 7
    assert [[tensor.data.tolist() for tensor in bucket] for bucket in weights.buckets()] == [[[4.0]]]
    assert group.doing() == [Activity("idle")] * 2
    with pytest.raises(CheckpointError, match="nowhere: holds no checkpoint") as caught:
        group.load("nowhere")
    assert type(caught.value) is CheckpointError


def test_a_rank_that_fails_to_publish_ends_the_publication_at_once() -> None:
    group = start(BROKEN)
    started = time.monotonic()
    with pytest.raises(KernelError, match="a layer: NaN in the weight"):
        group.publish(1)
    assert time.monotonic() - started < 300
    group.close()


def test_a_worker_that_starts_later_reads_the_weights_that_were_sent(group: LearnerGroup) -> None:
    sending = LearnerGroup(group.ranks, transfer=lambda: ["a worker"])
    weights = sending.publish(7)
    assert isinstance(weights, SentWeights)
    assert weights.manifest == make_weights(7, theta=4.0).manifest
    assert [[tensor.data.tolist() for tensor in bucket] for bucket in weights.buckets()] == [[[4.0]]]


def test_a_transfer_that_hangs_ends(lost: LearnerGroup) -> None:
    sending = LearnerGroup(lost.ranks, transfer=lambda: [], transfer_timeout_s=1.0)
    with pytest.raises(PublicationError, match="transfer of weights version 7: did not end within 1 s") as caught:
        sending.publish(7)
    assert caught.value.hint == AGAIN


def test_a_rank_that_hangs_ends_every_call(lost: LearnerGroup, tmp_path: Path) -> None:
    log = tmp_path / "rank-0.log"
    log.write_text("was busy\n")
    limited = LearnerGroup(lost.ranks, timeout_s=1.0, log_dir=tmp_path)
    seen = set[str]()
    sent = LearnerGroup(lost.ranks, transfer=lambda: ["a worker"], timeout_s=1.0).publish(7)
    pid = ray.get(lost.ranks[0].__ray_call__.remote(lambda _: os.getpid()))
    os.kill(pid, signal.SIGSTOP)
    sequences = [TrainSequence((1,), (1,), np.zeros(1, np.float32))]
    with ThreadPoolExecutor() as pool:
        result = pool.submit(limited.score, sequences)
        while not result.done():
            seen.add(limited.doing()[1].word)
            time.sleep(0.05)
    assert seen - {"idle"} == {"scoring"}  # as long as nobody has answered
    assert limited.doing() == [Activity("idle")] * 2
    calls = {
        "update": lambda: limited.update([sequences]),
        "score": lambda: limited.score(sequences),
        "publish": lambda: limited.publish(1),
        "start": lambda: LearnerGroup(lost.ranks, timeout_s=1.0, log_dir=tmp_path),
    }
    for method, call in calls.items():
        with pytest.raises(QarlError) as caught:
            call()
        assert str(caught.value).startswith(f"learner ranks, {method}: did not end within 1 s; its log {log} ends with")
        assert caught.value.hint == f"{AGAIN}; raise learner.timeout_s if the ranks were at work"
    with pytest.raises(PublicationError, match="the learner does not give its weights"):
        sent.buckets()
    os.kill(pid, signal.SIGCONT)


def test_a_dead_rank_shows_its_log_and_says_how_to_go_on(lost: LearnerGroup, tmp_path: Path) -> None:
    log = tmp_path / "rank-0.log"
    log.write_text("started\nwas busy\n")
    logging = LearnerGroup(lost.ranks, log_dir=tmp_path)
    with pytest.raises(QarlError, match="a learner rank died during save") as caught:
        logging.save(str(tmp_path))
    assert f"; its log {log} ends with: was busy; " in str(caught.value)
    assert caught.value.hint == AGAIN
    assert "\n" not in str(caught.value)


def test_what_no_one_foresaw_is_one_line(group: LearnerGroup, tmp_path: Path) -> None:
    log = tmp_path / "rank-0.log"
    log.write_text("was busy\n")
    with pytest.raises(ActorError) as caught:
        LearnerGroup(group.ranks, log_dir=tmp_path).score([None])  # type: ignore[list-item]
    assert str(caught.value).startswith("learner ranks, score: AttributeError: ")
    assert str(caught.value).endswith(f"; its log {log} ends with: was busy")


def test_a_rank_that_cannot_start_says_why() -> None:
    actor = ray.remote(FakeRank).options(num_cpus=0).remote(0, 1, NO_MODEL)
    with pytest.raises(ModelError, match="no such model"):
        LearnerGroup([actor])
    ray.kill(actor)

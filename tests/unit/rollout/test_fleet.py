"""The fleet over real Ray actors: faults, order, errors."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray

from qarl.errors import KernelError, PublicationError, RolloutError
from qarl.quant.scheme import QuantScheme
from qarl.types import Activity, Sample, SampleRequest
from rollout.dispatch import Dispatcher
from rollout.fleet import RayFleet
from rollout.worker import RolloutWorker
from tests.support.fakes import BAD_DIGEST, FakeEngine, FakeProver, make_prompts, make_weights, wait_until_gone

pytestmark = pytest.mark.usefixtures("local_ray")
PROMPTS = make_prompts(6)
CAPACITY = 64
REQUESTS = [SampleRequest(prompt, seed=i, temperature=1.0, max_new_tokens=8) for i, prompt in enumerate(PROMPTS)]


class Fleet:
    """A RayFleet with weights of version 1, the orders for its faults, and what it noted."""

    def __init__(
        self,
        faults: Path,
        num_workers: int,
        timeout_s: float = 60.0,
        max_restarts: int = 3,
        engine: type[FakeEngine] = FakeEngine,
    ) -> None:
        self.faults, self.engine, self.notes = faults, engine, list[str]()
        self.spares: dict[int, Any] = {}
        settings = (num_workers, CAPACITY, timeout_s, max_restarts)
        self.fleet = RayFleet(self._make_actor, QuantScheme(), *settings, self.notes.append)
        self.prover = FakeProver(REQUESTS[:2])
        self.fleet.load(make_weights(1, theta=2.0), self.prover)

    def _make_actor(self, worker: int, scheme: QuantScheme) -> Any:
        return self.spares.pop(worker, None) or start(worker, self.faults, self.engine)

    def load(self, version: int, theta: float, **weights: str) -> list[list[tuple[Any, ...]]]:
        """Load weights with a new prover; returns what it judged, worker by worker."""
        self.prover = FakeProver(REQUESTS[:2])
        gaps = self.fleet.load(make_weights(version, theta, **weights), self.prover)
        ((judged, samples),) = self.prover.judged
        assert judged == version
        assert gaps == dict.fromkeys(range(len(samples)), 0.0)
        return [content(samples[worker]) for worker in range(len(samples))]

    def order(self, prompt_id: str, what: str) -> None:
        (self.faults / prompt_id).write_text(what)


def start(worker: int, faults: Path, engine: type[FakeEngine] = FakeEngine) -> Any:
    actor = ray.remote(RolloutWorker).options(num_cpus=0)
    return actor.remote(lambda number: engine(number, faults=faults), worker)


MakeFleet = Callable[..., Fleet]


@pytest.fixture
def make_fleet(tmp_path: Path) -> Iterator[MakeFleet]:
    made: list[Fleet] = []

    def make(num_workers: int, **settings: Any) -> Fleet:
        made.append(Fleet(tmp_path, num_workers, **settings))
        return made[-1]

    yield make
    for fleet in made:
        fleet.fleet.close()


def expected(theta: float, version: int, requests: Sequence[SampleRequest] = REQUESTS) -> list[tuple[Any, ...]]:
    engine = FakeEngine()
    engine.load(make_weights(version, theta))
    return content(engine.generate(requests))


def content(samples: Sequence[Sample]) -> list[tuple[Any, ...]]:
    return [(s.prompt.id, s.response_ids, s.logprobs_T.tolist(), s.version) for s in samples]


def kill(fleet: RayFleet, worker: int) -> None:
    """Kill a worker, and wait until it is dead: Ray only sets about it."""
    pid = fleet.infos()[worker].pid
    ray.kill(fleet.actors[worker])
    wait_until_gone(pid)


def test_samples_come_in_order_from_all_workers(make_fleet: MakeFleet) -> None:
    made = make_fleet(2)
    fleet = made.fleet
    assert [info.worker for info in fleet.infos()] == [0, 1]
    assert len({info.pid for info in fleet.infos()} | {os.getpid()}) == 3
    for count in (0, 1, 5, 6):
        samples = fleet.sample(REQUESTS[:count])
        assert content(samples) == expected(2.0, 1, REQUESTS[:count])
    assert [sample.worker for sample in fleet.sample(REQUESTS)] == [0, 1, 0, 1, 0, 1]
    assert made.load(2, theta=3.0) == [expected(3.0, 2, REQUESTS[:2])] * 2
    assert made.notes == []


def test_close_ends_the_processes(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(2).fleet
    pids = [info.pid for info in fleet.infos()]
    fleet.close()
    for pid in pids:
        wait_until_gone(pid)
    assert fleet.actors == []


def test_a_worker_killed_while_it_samples_is_replaced(make_fleet: MakeFleet) -> None:
    made = make_fleet(2)
    before = made.fleet.infos()
    made.order("p3", "die")  # the second request of worker 1
    assert content(made.fleet.sample(REQUESTS)) == expected(2.0, 1)
    [note] = made.notes
    assert note.startswith("rollout worker 1 died during generate")
    assert note.endswith("(2 replacements left)")
    after = made.fleet.infos()
    assert (after[0].pid, after[0].worker, after[1].worker) == (before[0].pid, 0, 1)
    assert after[1].pid != before[1].pid
    # Its prover has judged it, alone, after it had judged all.
    assert [(version, list(samples)) for version, samples in made.prover.judged] == [(1, [0, 1]), (1, [1])]
    assert content(made.prover.judged[1][1][1]) == expected(2.0, 1, REQUESTS[:2])
    # It goes on as a member: it takes the next version.
    assert made.load(2, theta=5.0) == [expected(5.0, 2, REQUESTS[:2])] * 2


class Refusal(FakeProver):
    """Accepts every worker at first, and no replacement."""

    def judge(self, samples: Mapping[int, Sequence[Sample]], version: int) -> dict[int, float]:
        if self.judged:
            raise PublicationError(f"workers {list(samples)} differ at version {version}")
        return super().judge(samples, version)


def test_a_replacement_that_its_prover_refuses_stops_the_run(make_fleet: MakeFleet) -> None:
    made = make_fleet(2)
    made.fleet.load(make_weights(2), Refusal(REQUESTS[:2]))
    made.order("p3", "die")
    with pytest.raises(PublicationError, match=r"workers \[1\] differ at version 2"):
        made.fleet.sample(REQUESTS)


def test_weights_without_a_prover_replace_the_prover_too(make_fleet: MakeFleet) -> None:
    made = make_fleet(1)
    assert made.fleet.load(make_weights(2, theta=5.0)) == {}
    made.order("p0", "die")
    assert content(made.fleet.sample(REQUESTS)) == expected(5.0, 2)
    assert [version for version, _ in made.prover.judged] == [1]


def test_a_worker_found_dead_when_weights_arrive_is_replaced(make_fleet: MakeFleet) -> None:
    made = make_fleet(1)
    kill(made.fleet, 0)
    assert made.load(2, theta=5.0) == [expected(5.0, 2, REQUESTS[:2])]
    [note] = made.notes
    assert note.startswith("rollout worker 0 died during load")


def test_a_worker_that_dies_asleep_wakes_as_another_with_its_weights(make_fleet: MakeFleet) -> None:
    made = make_fleet(2)
    made.fleet.sleep()
    for actor in made.fleet.actors:
        with pytest.raises(AssertionError, match="asleep"):
            ray.get(actor.generate.remote(REQUESTS[:1]))
    kill(made.fleet, 1)
    made.fleet.wake()
    [note] = made.notes
    assert note.startswith("rollout worker 1 died during wake")
    assert [(version, list(samples)) for version, samples in made.prover.judged] == [(1, [0, 1]), (1, [1])]
    assert content(made.fleet.sample(REQUESTS)) == expected(2.0, 1)


def test_a_replacement_that_dies_too_is_replaced(make_fleet: MakeFleet) -> None:
    made = make_fleet(1)
    made.order("p0", "die")
    made.order("p1", "die")
    assert content(made.fleet.sample(REQUESTS)) == expected(2.0, 1)
    assert len(made.notes) == 2


def test_too_many_deaths_stop_the_run(make_fleet: MakeFleet) -> None:
    made = make_fleet(1, max_restarts=1)
    made.order("p0", "die")
    made.order("p1", "die")
    with pytest.raises(RolloutError, match="died during generate") as caught:
        made.fleet.sample(REQUESTS)
    assert caught.value.where == "rollout worker 0"
    assert "\n" not in str(caught.value)
    assert len(made.notes) == 1


def test_a_worker_that_hangs_is_replaced(make_fleet: MakeFleet, tmp_path: Path) -> None:
    made = make_fleet(2, timeout_s=60)
    old = made.fleet.infos()[0].pid
    made.spares[0] = start(0, tmp_path)
    new = ray.get(made.spares[0].info.remote()).pid  # up and running: the short time-out is for the hung one alone
    made.fleet._timeout_s = 3.0
    made.order("p0", "hang")
    assert content(made.fleet.sample(REQUESTS)) == expected(2.0, 1)
    assert made.notes == ["rollout worker 0 did not answer generate within 3 s; replacing it (2 replacements left)"]
    assert made.fleet.infos()[0].pid == new
    wait_until_gone(old)


def test_refused_weights_reach_the_caller_as_they_were_raised(make_fleet: MakeFleet) -> None:
    made = make_fleet(2)
    with pytest.raises(PublicationError) as caught:
        made.load(2, theta=0.0, digest=BAD_DIGEST)
    assert type(caught.value) is PublicationError
    assert str(caught.value) == "weights version 2: theta differs from its digest"
    assert made.notes == []  # a refusal is no death


def test_a_bug_in_a_worker_is_no_death(make_fleet: MakeFleet) -> None:
    made = make_fleet(1)
    made.order("p0", "bug")
    with pytest.raises(RolloutError, match="worker 0, generate: ZeroDivisionError: division by zero"):
        made.fleet.sample(REQUESTS)
    assert made.notes == []


def test_an_engine_that_cannot_start_says_why() -> None:
    def no_kernel(worker: int) -> FakeEngine:
        raise KernelError("no low-bit kernel", where=f"worker {worker}")

    notes: list[str] = []
    actor = ray.remote(RolloutWorker).options(num_cpus=0)
    fleet = RayFleet(
        lambda worker, _: actor.remote(no_kernel, worker), QuantScheme(), 1, CAPACITY, 60.0, 3, notes.append
    )
    with pytest.raises(KernelError) as caught:
        fleet.infos()
    fleet.close()
    assert str(caught.value) == "worker 0: no low-bit kernel"
    assert notes == []  # another try would fail alike


def test_a_worker_found_dead_before_a_transfer_waits_for_the_new_weights(make_fleet: MakeFleet) -> None:
    made = make_fleet(2)
    kill(made.fleet, 1)
    receivers = made.fleet.receivers()
    assert receivers == made.fleet.actors
    assert made.notes[0].startswith("rollout worker 1 died during info")
    (sample,) = ray.get(receivers[1].generate.remote(REQUESTS[:1]))
    assert sample.version == -1  # the learner may no longer have version 1
    assert made.load(2, theta=5.0) == [expected(5.0, 2, REQUESTS[:2])] * 2


def test_a_dead_workers_log_is_named_and_its_last_line_shown(tmp_path: Path) -> None:
    def make_actor(worker: int, scheme: QuantScheme) -> Any:
        actor = ray.remote(RolloutWorker).options(num_cpus=0)
        return actor.remote(lambda number: FakeEngine(number, faults=tmp_path), worker, log)

    log, notes = tmp_path / "worker-0.log", list[str]()
    fleet = RayFleet(make_actor, QuantScheme(), 1, CAPACITY, 60.0, 1, notes.append, tmp_path)
    for prompt in ("p0", "p1"):
        (tmp_path / prompt).write_text("die")
    with pytest.raises(RolloutError) as caught:
        fleet.sample(REQUESTS)
    fleet.close()
    for message in (caught.value.hint, notes[0]):
        assert f"its log {log} ends with: " in message
        assert "INFO rollout.worker: samples 1 requests" in message
    assert log.read_text().count("samples 1 requests") >= 2  # the replacement appended


def test_groups_come_as_they_finish_and_aborted_ones_do_not(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(2).fleet
    groups = [[replace(request, seed=seed) for seed in range(3)] for request in REQUESTS]
    numbers = fleet.submit(groups)
    fleet.abort(numbers[4:])
    assert content(fleet.sample(REQUESTS[:2])) == expected(2.0, 1, REQUESTS[:2])  # others go on meanwhile
    finished: dict[int, list[Sample]] = {}
    while len(finished) < 4:
        finished |= fleet.poll(60.0)
    assert {number: content(samples) for number, samples in finished.items()} == {
        number: expected(2.0, 1, group) for number, group in zip(numbers[:4], groups, strict=False)
    }
    assert all(len({sample.worker for sample in samples}) == 1 for samples in finished.values())
    assert fleet.poll(0.0) == {}


def test_a_switch_of_scheme_follows_groups_that_were_aborted(make_fleet: MakeFleet) -> None:
    made = make_fleet(1)
    before = made.fleet.infos()[0].pid
    made.fleet.abort(made.fleet.submit([REQUESTS[:3], REQUESTS[3:], REQUESTS[:2]]))
    made.fleet.switch(QuantScheme("w4a16"))
    made.load(2, theta=5.0)
    assert content(made.fleet.sample(REQUESTS)) == expected(5.0, 2)
    assert made.fleet.infos()[0].pid != before
    assert made.notes == []  # the end of the old engine is no death


def test_weights_wait_for_what_runs_and_what_waits_gets_them(make_fleet: MakeFleet) -> None:
    made = make_fleet(1)
    made.fleet._dispatcher = Dispatcher(1, capacity=1)
    first, second = made.fleet.submit([REQUESTS[:1], REQUESTS[1:2]])
    assert made.fleet.queued() == {second}
    made.load(2, theta=5.0)
    finished: dict[int, list[Sample]] = {}
    while len(finished) < 2:
        finished |= made.fleet.poll(60.0)
    assert content(finished[first]) == expected(2.0, 1, REQUESTS[:1])
    assert content(finished[second]) == expected(5.0, 2, REQUESTS[1:2])


class Watched(FakeProver):
    """Notes what the fleet says of its workers while it judges."""

    def judge(self, samples: Mapping[int, Sequence[Sample]], version: int) -> dict[int, float]:
        self.seen = self.fleet.doing()
        return super().judge(samples, version)

    fleet: RayFleet
    seen: list[Activity]


def test_the_fleet_says_what_each_worker_does(make_fleet: MakeFleet) -> None:
    made, idle = make_fleet(2), Activity("idle")
    fleet, prover = made.fleet, Watched(REQUESTS[:2])
    prover.fleet = fleet
    fleet.load(make_weights(1, theta=2.0), prover)
    assert fleet.doing() == [idle, idle]
    groups = [[request] for request in REQUESTS[:3]]
    fleet.submit(groups)
    assert fleet.doing() == [Activity("sampling", 0, 2), Activity("sampling", 0, 1)]
    seen, finished = list[list[Activity]](), dict[int, list[Sample]]()
    while len(finished) < 3:
        finished |= fleet.poll(60.0)
        seen.append(fleet.doing())
    assert {of_worker[0] for of_worker in seen} <= {Activity("sampling", 0, 2), Activity("sampling", 1, 2), idle}
    assert fleet.doing() == [idle, idle]
    fleet.sleep()
    assert fleet.infos()  # does not wake them
    assert fleet.doing() == [Activity("asleep")] * 2
    fleet.wake()
    made.order("p3", "die")
    fleet.sample([REQUESTS[3]])
    assert prover.seen == [Activity("restarting"), idle]
    assert fleet.doing() == [idle, idle]
    fleet.switch(QuantScheme("w4a16"))
    assert fleet.doing() == [Activity("starting")] * 2
    fleet.load(make_weights(2))
    assert fleet.doing() == [idle, idle]


class OfNow(FakeProver):
    """Refuses samples of any version but the learner's, as a probe does."""

    def __init__(self, requests: Sequence[SampleRequest]) -> None:
        super().__init__(requests)
        self.learner = 1

    def judge(self, samples: Mapping[int, Sequence[Sample]], version: int) -> dict[int, float]:
        found = {sample.version for of_worker in samples.values() for sample in of_worker}
        if found | {version} != {self.learner}:
            raise PublicationError(f"samples of versions {found}, the learner has {self.learner}")
        return super().judge(samples, version)


def test_a_worker_that_dies_while_weights_wait_is_replaced_with_the_new_ones(make_fleet: MakeFleet) -> None:
    made = make_fleet(2)
    prover = OfNow(REQUESTS[:2])
    made.fleet.load(make_weights(1, theta=2.0), prover)
    made.order("p4", "die")  # in the second group, which worker 1 has; the fleet sees it when it waits for that group
    first, second = made.fleet.submit([REQUESTS[:3], REQUESTS[3:]])
    prover.learner = 2
    made.fleet.load(make_weights(2, theta=5.0), prover)
    [note] = made.notes
    assert note.startswith("rollout worker 1 died during generate")
    assert [(version, list(samples)) for version, samples in prover.judged] == [(1, [0, 1]), (2, [0, 1])]
    finished: dict[int, list[Sample]] = {}
    while len(finished) < 2:
        finished |= made.fleet.poll(60.0)
    assert content(finished[first]) == expected(2.0, 1, REQUESTS[:3])
    assert content(finished[second]) == expected(5.0, 2, REQUESTS[3:])  # what was lost is sampled from the new weights


class Waiting(FakeEngine):
    """Partial responses get one token of version 1, and no more before the next version."""

    def step(self) -> dict[int, Sample]:
        held = {
            number: (begun + 1, sample, request)
            for number, (begun, sample, request) in self.running.items()
            if request.partial and self.version == 1 and self.steps > begun
        }
        for number in held:
            del self.running[number]
        finished = super().step()
        self.running |= held
        return finished


def test_partial_groups_go_on_with_new_weights(make_fleet: MakeFleet) -> None:
    made = make_fleet(2, engine=Waiting)
    numbers = made.fleet.submit([[replace(request, partial=True)] for request in REQUESTS])
    for _ in range(2):  # calls are answered between steps: all requests have begun at the first one
        made.fleet.infos()
    made.load(2, theta=5.0)
    assert len(made.fleet._streams) == len(REQUESTS)  # the load has waited for none
    finished: dict[int, list[Sample]] = {}
    while len(finished) < len(REQUESTS):
        finished |= made.fleet.poll(60.0)
    samples = [finished[number][0] for number in numbers]
    assert [sample.prompt for sample in samples] == PROMPTS
    lengths = [len(response_ids) for _, response_ids, *_ in expected(2.0, 1)]
    assert [sample.versions for sample in samples] == [[1] if length == 1 else [1, 2] for length in lengths]
    assert max(lengths) > 1

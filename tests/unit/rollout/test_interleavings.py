"""The real fleet, workers and engines at any timing and with any deaths: who samples what, and with which weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from random import Random
from typing import Any

from hypothesis import event, given, settings
from hypothesis import strategies as st

from qarl.quant.scheme import QuantScheme
from qarl.types import Sample, SampleRequest
from rollout.fleet import RayFleet
from tests.support.fakes import FakeProver, logprobs, make_prompts, make_weights
from tests.support.virtual_ray import Actor, Stream, VirtualRay, next_token

TIMEOUT_S, MAX_RESTARTS = 200.0, 99
PROBE = [SampleRequest(prompt, 7, 1.0, 3) for prompt in make_prompts(2, "probe")]
ACTIONS = 4 * ["submit"] + 6 * ["poll"] + 3 * ["publish"] + ["abort", "evaluate", "rest", "switch"]


class Driver:
    """What the training loop may do to a fleet, and what it must then see. `publish` comes first.

    Args:
        rng: chooses what the virtual Ray does next, and the arguments of the calls.
        partial: responses go on under new weights.
    """

    def __init__(self, virtual: VirtualRay, rng: Random, workers: int, capacity: int, partial: bool) -> None:
        self._ray, self._rng, self._capacity, self._partial = virtual, rng, capacity, partial
        self.open: dict[int, tuple[list[SampleRequest], int]] = {}
        """Groups that have not come out, with the version that the fleet had when they were submitted."""
        self._judged: set[tuple[Actor, int]] = set()
        self._is_switching = False
        self._version = self._seed = 0
        self._looked = 0.0, 0.0
        """At the last look: how long workers were busy, and what time it was."""
        self.notes = list[str]()
        self._ray.on_call, self._ray.on_kill = self._called, self._killed
        settings = (QuantScheme("none"), workers, capacity, TIMEOUT_S, MAX_RESTARTS, self.notes.append)
        self.fleet = RayFleet(virtual.start, *settings)

    def submit(self) -> None:
        groups = self._groups([self._rng.randint(1, 4) for _ in range(self._rng.randint(1, 5))], self._partial)
        numbers = self.fleet.submit(groups)
        assert self.open.keys().isdisjoint(numbers)
        self.open |= {number: (group, self._version) for number, group in zip(numbers, groups, strict=True)}
        self._none_idle()

    def poll(self, timeouts_s: Sequence[float] = (0.0, 1.0, 3.0, 3 * TIMEOUT_S)) -> None:
        self._ray.on_wait = self._none_idle
        finished = self.fleet.poll(self._rng.choice(timeouts_s))
        self._ray.on_wait = lambda: None
        for number, samples in finished.items():
            group, oldest = self.open.pop(number)
            for sample, request in zip(samples, group, strict=True):
                check(sample, request)
                assert sample.versions == sorted(sample.versions)
                assert oldest <= sample.versions[0] <= sample.version <= self._version
                assert len(sample.versions) == 1 or self._partial
                event(f"{len(sample.versions)} versions")

    def abort(self) -> None:
        self._give_back([number for number in self.open if self._rng.random() < 0.3])

    def publish(self) -> None:
        """When weights are sent, as by NCCL, there are no partial rollouts."""
        if not self._partial and self._rng.random() < 0.3:
            self.fleet.receivers()
        self._version += 1
        gaps = self.fleet.load(make_weights(self._version, theta(self._version)), Judge(self))
        assert gaps == dict.fromkeys(range(len(self.fleet.actors)), 0.0)
        for actor in self.fleet.actors:
            assert actor.version == self._version
            assert (actor, self._version) in self._judged
        assert self._partial or not self.fleet._streams

    def evaluate(self) -> None:
        requests = [request for group in self._groups([1] * self._rng.randint(1, 5), False) for request in group]
        self._ray.on_wait = self._none_idle
        samples = self.fleet.sample(requests)
        self._ray.on_wait = lambda: None
        for sample, request in zip(samples, requests, strict=True):
            check(sample, request)
            assert sample.versions == [self._version]

    def rest(self) -> None:
        self._give_back(list(self.open))
        self.fleet.sleep()
        self.fleet.wake()

    def switch(self) -> None:
        self._give_back(list(self.open))
        self._is_switching = True
        self.fleet.switch(QuantScheme("none"))
        self._is_switching = False
        self.publish()

    def finish(self) -> None:
        """All that is open comes out, and nothing else."""
        for _ in range(1000):
            if self.open:
                self.poll([3 * TIMEOUT_S])
        assert not self.open
        assert self.fleet.poll(0.0) == {}

    def close(self) -> None:
        self._is_switching = True
        self.fleet.close()

    def look(self) -> None:
        busy_s, now = self.fleet.busy_s(), self._ray.now
        assert 0.0 <= busy_s - self._looked[0] <= now - self._looked[1] + 1e-6
        self._looked = busy_s, now
        assert self.fleet._requests.keys() | self.fleet._finished.keys() == self.open.keys()

    def judged(self, samples: Mapping[int, Sequence[Sample]], version: int) -> None:
        assert version == self._version
        for worker, of_worker in samples.items():
            self._judged.add((self.fleet.actors[worker], version))
            for sample, request in zip(of_worker, PROBE, strict=True):
                assert sample.versions == [version]
                check(sample, request)

    def _groups(self, sizes: Sequence[int], partial: bool) -> list[list[SampleRequest]]:
        groups = []
        for size in sizes:
            (prompt,) = make_prompts(1, f"p{self._seed}-")
            request = SampleRequest(prompt, 0, 1.0, 12, partial=partial)
            groups.append([replace(request, seed=self._seed + index) for index in range(size)])
            self._seed += size
        return groups

    def _give_back(self, numbers: Sequence[int]) -> None:
        self.fleet.abort(numbers)
        for number in numbers:
            del self.open[number]

    def _loads(self) -> list[int]:
        """Unfinished requests of each worker, as far as the fleet knows."""
        return [
            sum(
                len(call.args[0]) - call.taken for call in actor.calls if isinstance(call, Stream) and not call.is_known
            )
            for actor in self.fleet.actors
        ]

    def _none_idle(self) -> None:
        assert not self.fleet.queued() or min(self._loads()) >= self._capacity

    def _called(self, actor: Actor, method: str, args: tuple[Any, ...]) -> None:
        """A group goes to the worker with the fewest requests, which has room and the weights of now, and to no other
        at the same time."""
        if method != "stream":
            return
        loads = self._loads()
        assert loads[self.fleet.actors.index(actor)] == min(loads) < self._capacity
        assert (actor, self._version) in self._judged
        others = [call for other in self._ray.actors if not other.is_dead for call in other.calls]
        assert not any(call.args == args for call in others if call.method == "stream")

    def _killed(self, actor: Actor) -> None:
        """Only what has died, stopped or been silent is replaced."""
        is_silent = self._ray.now - actor.heard >= TIMEOUT_S
        assert actor.is_dead or actor.is_stopped or is_silent or self._is_switching


class Judge(FakeProver):
    def __init__(self, driver: Driver) -> None:
        super().__init__(PROBE)
        self._driver = driver

    def judge(self, samples: Mapping[int, Sequence[Sample]], version: int) -> dict[int, float]:
        self._driver.judged(samples, version)
        return super().judge(samples, version)


def theta(version: int) -> float:
    return 2.0 * version


def check(sample: Sample, request: SampleRequest) -> None:
    """Each token is the one that the weights of its version give at its place, and its log-prob is theirs."""
    ids = sample.response_ids
    versions = [sample.version] * len(ids) if sample.versions_T is None else sample.versions_T.tolist()
    assert sample.prompt == request.prompt
    assert versions[-1] == sample.version
    made = [next_token(request.seed, place, theta(version)) for place, version in enumerate(versions)]
    assert [token for token, _ in made] == list(ids)
    assert not any(is_last for _, is_last in made[:-1])
    assert made[-1][1] or len(ids) == request.max_new_tokens
    expected = [logprobs(theta(version), [token])[0] for token, version in zip(ids, versions, strict=True)]
    assert sample.logprobs_T.tolist() == expected


@settings(max_examples=100)
@given(
    actions=st.lists(st.sampled_from(ACTIONS), min_size=10, max_size=40),
    rng=st.randoms(use_true_random=True),
    workers=st.integers(1, 3),
    capacity=st.integers(1, 8),
    blocks=st.integers(3, 9),
    faults=st.integers(0, 4),
    partial=st.booleans(),
)
def test_every_group_comes_out_once_as_the_weights_of_then_make_it(
    actions: list[str], rng: Random, workers: int, capacity: int, blocks: int, faults: int, partial: bool
) -> None:
    """Each group comes out once or is given back once. A sample's segments are of the versions that its engine had when
    it made their tokens, none older than the fleet's version at the time of the request. No worker is idle while groups
    wait; after a publication all have the version, and no other worker samples."""
    with VirtualRay(rng, faults, blocks).installed() as virtual:
        driver = Driver(virtual, rng, workers, capacity, partial)
        for action in ["publish", *actions, "finish"]:
            getattr(driver, action)()
            driver.look()
        driver.close()
    for note in driver.notes:
        event(" ".join(note.split()[3:7]))


def fleet_of_one(virtual: VirtualRay, capacity: int, notes: list[str]) -> RayFleet:
    """One worker, which must answer within 30 s; a response takes at most 12 steps of a second."""
    fleet = RayFleet(virtual.start, QuantScheme("none"), 1, capacity, 30.0, MAX_RESTARTS, notes.append)
    fleet.load(make_weights(1, 4.0))
    return fleet


LONG = next(seed for seed in range(10**4) if not any(next_token(seed, place, 4.0)[1] for place in range(12)))
"""The seed of a response that no last token ends under the weights 4."""


def single_requests(count: int) -> list[list[SampleRequest]]:
    return [[SampleRequest(prompt, seed, 1.0, 12)] for seed, prompt in enumerate(make_prompts(count))]


def poll_all(fleet: RayFleet, numbers: Sequence[int]) -> None:
    left = set(numbers)
    while left:
        left -= fleet.poll(100.0).keys()


def test_what_is_asked_for_first_comes_before_what_waits_and_in_order() -> None:
    groups, asked = single_requests(6), []
    with VirtualRay(Random(0)).installed() as virtual:
        fleet = fleet_of_one(virtual, 1, [])
        virtual.on_call = lambda _, method, args: asked.append(args[0]) if method == "stream" else None
        numbers = fleet.submit(groups[:3])
        fleet.sample([*groups[3], *groups[4], *groups[5]])
        poll_all(fleet, numbers)
        fleet.close()
    assert asked == [groups[index] for index in (0, 3, 4, 5, 1, 2)]


def test_a_worker_that_always_has_groups_is_silent_only_between_two_of_them() -> None:
    notes = list[str]()
    with VirtualRay(Random(0)).installed() as virtual:
        fleet = fleet_of_one(virtual, 8, notes)
        poll_all(fleet, fleet.submit(single_requests(160)))
        assert virtual.now > 90
        fleet.close()
    assert notes == []


def test_while_a_worker_loads_it_is_not_silent() -> None:
    notes = list[str]()
    with VirtualRay(Random(0)).installed() as virtual:
        fleet = fleet_of_one(virtual, 4, notes)
        numbers = fleet.submit([[SampleRequest(*make_prompts(1), LONG, 1.0, 12, partial=True)]])

        def load_slowly(actor: Actor, method: str, _: tuple[Any, ...]) -> None:
            virtual.now += 40 * (method == "load")

        virtual.on_call = load_slowly
        fleet.load(make_weights(2, 4.0))
        poll_all(fleet, numbers)
        fleet.close()
    assert notes == []

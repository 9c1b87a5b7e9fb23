"""Any sizes, timings and deaths: every group is sampled once, with the samples that its seeds give."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from qarl.types import Sample, SampleRequest
from rollout.dispatch import Dispatcher
from tests.support.fakes import FakeEngine, make_prompts, make_weights

PROMPTS = make_prompts(12)


def test_groups_go_to_the_least_loaded_worker_with_room() -> None:
    dispatcher = Dispatcher(2, capacity=8)
    for number, size in enumerate([8, 2, 4, 4, 2]):
        dispatcher.add(number, size)
    assert list(dispatcher.assign()) == [(0, 0), (1, 1), (2, 1), (3, 1)]
    assert [dispatcher.load(worker) for worker in (0, 1)] == [8, 10]
    dispatcher.add(9, 1, first=True)
    dispatcher.finish_one(0)
    assert list(dispatcher.assign()) == [(9, 0)]  # one of its requests is finished
    assert [dispatcher.load(worker) for worker in (0, 1)] == [8, 10]
    dispatcher.remove(0)
    assert list(dispatcher.assign()) == [(4, 0)]
    dispatcher.finish_one(2)
    dispatcher.lose(1)
    assert list(dispatcher.assign()) == [(1, 1), (2, 1), (3, 0)]


@given(st.data(), st.lists(st.integers(0, 5), min_size=1, max_size=12), st.integers(1, 4), st.integers(1, 12))
def test_samples_do_not_depend_on_the_dispatch(data: st.DataObject, sizes: list[int], workers: int, room: int) -> None:
    groups = [
        [SampleRequest(prompt, 100 * number + index, 1.0, 8) for index in range(size)]
        for number, (prompt, size) in enumerate(zip(PROMPTS, sizes, strict=False))
    ]
    dispatcher = Dispatcher(workers, room)
    for number, group in enumerate(groups):
        dispatcher.add(number, len(group))
    engines = [engine() for _ in range(workers)]
    finished: dict[int, list[Sample]] = {}
    partly: dict[int, dict[int, Sample]] = {}
    deaths = 3
    while len(finished) < len(groups):
        for number, worker in dispatcher.assign():
            engines[worker].add(dict(enumerate(groups[number], 100 * number)))
            partly[number] = {}
        waiting = len(groups) - len(finished) - sum(len(dispatcher.given(worker)) for worker in range(workers))
        assert not waiting or all(dispatcher.load(worker) >= room for worker in range(workers))
        worker = data.draw(st.integers(0, workers - 1))
        if deaths and data.draw(st.integers(0, 9)) == 0:
            deaths, engines[worker] = deaths - 1, engine()
            dispatcher.lose(worker)
            continue
        for key, sample in engines[worker].step().items():
            partly[key // 100][key % 100] = sample
            dispatcher.finish_one(key // 100)
        for number in dispatcher.given(worker):
            if len(partly[number]) == len(groups[number]):
                assert number not in finished
                finished[number] = [partly[number][index] for index in range(len(groups[number]))]
                dispatcher.remove(number)
    alone = engine()
    for number, group in enumerate(groups):
        assert [s.response_ids for s in finished[number]] == [s.response_ids for s in alone.generate(group)]


def engine() -> FakeEngine:
    made = FakeEngine()
    made.load(make_weights(1, theta=2.0))
    return made

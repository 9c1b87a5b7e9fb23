"""Which requests an engine begins; vLLM is a double."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qarl.errors import ResourceError, RolloutError
from qarl.types import Prompt, SampleRequest
from rollout.engine import VLLMEngine

BLOCK, BLOCKS, LONGEST = 16, 9, 64


@dataclass
class LLM:
    """Takes every request, keeps the largest number of blocks that those it had at once may need, and finishes those
    that it is told to."""

    needs: dict[str, int] = field(default_factory=dict)
    """Blocks of the KV cache, by request that runs."""
    most: int = 0
    begun: list[int] = field(default_factory=list)
    finish: Sequence[int] = ()
    levels: list[int] = field(default_factory=list)
    """At which vLLM slept, and 0 for each time that it woke."""

    model_config = SimpleNamespace(max_model_len=LONGEST)

    @property
    def llm_engine(self) -> LLM:
        return self

    renderer = SimpleNamespace(render_cmpl=lambda prompts: [prompts[0]["prompt_token_ids"]])

    def sleep(self, level: int) -> None:
        assert not self.is_sleeping()
        self.levels.append(level)

    def wake_up(self) -> None:
        assert self.is_sleeping()
        self.levels.append(0)

    def is_sleeping(self) -> bool:
        return bool(self.levels and self.levels[-1])

    def add_request(self, number: str, prompt: list[int], request: SampleRequest) -> None:
        self.begun.append(int(number))
        self.needs[number] = -(-min(len(prompt) + request.max_new_tokens, LONGEST) // BLOCK)
        self.most = max(self.most, sum(self.needs.values()))

    def abort_request(self, numbers: list[str]) -> None:
        for number in numbers:
            del self.needs[number]

    def step(self) -> list[Any]:
        ended = [number for i, number in enumerate(self.needs) if i in self.finish] or list(self.needs)[:1]
        response = SimpleNamespace(token_ids=(5,), logprobs=[{5: SimpleNamespace(logprob=-1.0)}], text="5")
        response.finish_reason = "stop"
        for number in ended:
            del self.needs[number]
        return [SimpleNamespace(request_id=number, finished=True, outputs=[response]) for number in ended]


def engine_of(llm: LLM) -> VLLMEngine:
    engine, held = object.__new__(VLLMEngine), SimpleNamespace(manifest=SimpleNamespace(version=1))
    room = {"_block": BLOCK, "_blocks": BLOCKS, "_longest_shared": LONGEST, "_partial_at_once": BLOCKS}
    vars(engine).update(_llm=llm, _held=held, _waiting={}, _running={}, _worker=0, **room)
    return engine


def request(prompt: int, tokens: int) -> SampleRequest:
    return SampleRequest(Prompt("p", "", "", (4,) * prompt), 0, 1.0, tokens)


@pytest.fixture(autouse=True, scope="module")
def _without_vllm() -> Any:
    with patch("rollout.engine._params", lambda request, longest_shared: request):
        yield


sizes = st.tuples(st.integers(1, LONGEST - 1), st.integers(1, LONGEST))


@settings(max_examples=100)
@given(st.lists(st.lists(sizes, min_size=1, max_size=4), min_size=1, max_size=8), st.data())
def test_no_more_begins_than_the_kv_cache_holds_to_the_end(groups: list[Any], data: st.DataObject) -> None:
    llm = LLM()
    engine, total, ended, aborted = engine_of(llm), 0, list[int](), set[int]()
    for group in groups:
        engine.add(dict(enumerate([request(*size) for size in group], total)))
        total += len(group)
        llm.finish = data.draw(st.lists(st.integers(0, 3)))
        ended += engine.step()
        gone = data.draw(st.sets(st.integers(0, total - 1), max_size=1)).difference(ended)
        engine.abort(iter(gone))
        aborted |= gone
    while engine._running or engine._waiting:
        ended += engine.step()
    assert sorted([*ended, *aborted]) == list(range(total))
    assert llm.most <= BLOCKS
    assert llm.begun == sorted(llm.begun)


def test_a_request_begins_as_soon_as_its_turn_has_room() -> None:
    llm = LLM()
    engine = engine_of(llm)
    engine.add({0: request(40, 24), 1: request(40, 24), 2: request(20, 20), 3: request(1, 1)})
    assert llm.begun == [0, 1]  # 4 + 4 of 9 blocks; 3 would fit, but 2 comes first
    engine.abort([1])
    engine.step()
    assert llm.begun == [0, 1, 2, 3]


def test_a_check_of_a_publication_begins_before_partial_responses() -> None:
    llm = LLM()
    engine = engine_of(llm)
    partial = replace(request(40, 24), partial=True)
    engine.add({0: partial, 1: partial, 2: partial, 3: partial})
    engine.add({4: request(20, 20)})
    engine.step()  # one ends
    assert llm.begun == [0, 1]
    engine.step()
    assert llm.begun[2] == 4


def test_partial_responses_leave_places_for_a_check() -> None:
    engine = engine_of(llm := LLM())
    engine._partial_at_once = 2
    engine.add(dict.fromkeys(range(4), replace(request(8, 8), partial=True)))
    engine.add({4: request(8, 8)})
    assert llm.begun == [0, 1, 4]
    engine.abort([0])
    engine.step()
    assert llm.begun == [0, 1, 4, 2]


def test_a_prompt_that_is_too_long_leaves_nothing_of_its_group() -> None:
    engine = engine_of(llm := LLM())
    engine.add({0: request(8, 8)})
    with pytest.raises(RolloutError, match="a prompt of 64 tokens leaves no room for a response in 64"):
        engine.add({1: request(8, 8), 2: request(64, 8)})
    assert list(engine._running) == [0]
    assert list(llm.needs) == ["0"]
    assert not engine._waiting


def test_a_cache_without_room_for_one_sequence_is_refused() -> None:
    engine = engine_of(LLM())
    assert engine._fitting(LONGEST) == 2
    engine._blocks = 3
    with pytest.raises(ResourceError, match="48 tokens holds no sequence of 64"):
        engine._fitting(LONGEST)


def test_an_engine_that_sleeps_keeps_its_weights_and_samples_nothing() -> None:
    engine = engine_of(llm := LLM())
    engine.wake()  # it is awake
    engine.sleep()
    with pytest.raises(RolloutError, match="cannot sample while it sleeps"):
        engine.add({0: request(8, 8)})
    engine.wake()
    engine.add({0: request(8, 8)})
    assert llm.levels == [1, 0]  # at level 2 vLLM drops weights
    assert llm.begun == [0]

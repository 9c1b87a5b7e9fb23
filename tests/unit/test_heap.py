"""IndexedHeap against a dict that is sorted on demand."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from qarl.prompts.heap import IndexedHeap, Priority

ITEMS = st.sampled_from([f"p{i}" for i in range(12)])
PRIORITIES = st.tuples(st.integers(0, 4).map(float))  # few values: ties are common


class HeapMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.heap = IndexedHeap()
        self.oracle: dict[str, Priority] = {}

    def smallest(self) -> str:
        return min(self.oracle, key=lambda item: (self.oracle[item], item))

    @rule(item=ITEMS, priority=PRIORITIES)
    def push(self, item: str, priority: Priority) -> None:
        if item in self.oracle:
            with pytest.raises(KeyError):
                self.heap.push(item, priority)
        else:
            self.heap.push(item, priority)
            self.oracle[item] = priority

    @rule(item=ITEMS, priority=PRIORITIES)
    def update(self, item: str, priority: Priority) -> None:
        if item in self.oracle:
            self.heap.update(item, priority)
            self.oracle[item] = priority
        else:
            with pytest.raises(KeyError):
                self.heap.update(item, priority)

    @rule(item=ITEMS)
    def remove(self, item: str) -> None:
        if item in self.oracle:
            self.heap.remove(item)
            del self.oracle[item]
        else:
            with pytest.raises(KeyError):
                self.heap.remove(item)

    @precondition(lambda self: self.oracle)
    @rule()
    def pop(self) -> None:
        expected = self.smallest()
        assert self.heap.pop() == expected
        del self.oracle[expected]

    @precondition(lambda self: not self.oracle)
    @rule()
    def empty(self) -> None:
        with pytest.raises(IndexError):
            self.heap.peek()
        with pytest.raises(IndexError):
            self.heap.pop()

    @invariant()
    def agrees(self) -> None:
        assert len(self.heap) == len(self.oracle)
        assert all(item in self.heap for item in self.oracle)
        assert "absent" not in self.heap
        if self.oracle:
            assert self.heap.peek() == self.smallest()

    def teardown(self) -> None:
        drained = [self.heap.pop() for _ in range(len(self.heap))]
        assert drained == sorted(self.oracle, key=lambda item: (self.oracle[item], item))


TestHeap = HeapMachine.TestCase
TestHeap.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)

"""LazyHeap against a dict that is sorted on demand."""

from __future__ import annotations

import math

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from qarl.prompts.heap import LazyHeap

SLOTS = st.integers(0, 11)
PRIORITIES = st.integers(0, 4).map(float)  # few values: ties are common


class HeapMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.heap = LazyHeap()
        self.oracle: dict[int, float] = {}

    def smallest(self) -> int:
        return min(self.oracle, key=lambda slot: (self.oracle[slot], slot))

    @rule(slot=SLOTS, priority=PRIORITIES)
    def push_or_update(self, slot: int, priority: float) -> None:
        self.heap.push(slot, priority)
        self.oracle[slot] = priority

    @rule(slot=SLOTS)
    def remove(self, slot: int) -> None:
        if slot in self.oracle:
            self.heap.remove(slot)
            del self.oracle[slot]
        else:
            with pytest.raises(KeyError):
                self.heap.remove(slot)

    @precondition(lambda self: self.oracle)
    @rule()
    def pop(self) -> None:
        expected = self.smallest()
        assert self.heap.top() == (self.oracle[expected], expected)
        assert self.heap.pop() == expected
        del self.oracle[expected]

    @rule(n=st.integers(0, 6), most=st.sampled_from([0.5, 2.0, math.inf]), kept=st.sets(st.integers(0, 5)))
    def take_some_and_put_the_others_back(self, n: int, most: float, kept: set[int]) -> None:
        taken = self.heap.take(n, most)
        near = sorted((priority, slot) for slot, priority in self.oracle.items() if priority <= most)
        assert taken == near[:n]
        for i in kept & set(range(len(taken))):
            del self.oracle[taken[i][-1]]
        self.heap.put_back(entry for i, entry in enumerate(taken) if i not in kept)

    @precondition(lambda self: not self.oracle)
    @rule()
    def empty(self) -> None:
        with pytest.raises(IndexError):
            self.heap.peek()
        with pytest.raises(IndexError):
            self.heap.pop()

    @rule(slot=SLOTS, priorities=st.lists(PRIORITIES, min_size=60, max_size=90))
    def update_often(self, slot: int, priorities: list[float]) -> None:
        """Enough dead entries for a compaction."""
        for priority in priorities:
            self.push_or_update(slot, priority)

    @invariant()
    def agrees(self) -> None:
        assert len(self.heap) == len(self.oracle)
        assert [slot for slot in range(20) if slot in self.heap] == sorted(self.oracle)
        held = len(self.heap._entries) + len(self.heap._returned)
        assert held == len(self.heap) + self.heap._dead
        assert held <= 65 + 1.25 * 12 + 6  # dead entries do not pile up
        if self.oracle:
            assert self.heap.peek() == self.smallest()

    def teardown(self) -> None:
        drained = [self.heap.pop() for _ in range(len(self.heap))]
        assert drained == sorted(self.oracle, key=lambda slot: (self.oracle[slot], slot))


TestHeap = HeapMachine.TestCase
TestHeap.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)

"""LazyHeap against a dict that is sorted on demand."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from qarl.prompts.heap import LazyHeap, sortable

SLOTS = st.integers(0, 11)
PRIORITIES = st.integers(0, 4).map(float)  # few values: ties are common
MOST = st.sampled_from([0.5, 2.0, math.inf])


class HeapMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.heap = LazyHeap("d")
        self.oracle: dict[int, float] = {}

    @rule(slot=SLOTS, priority=PRIORITIES)
    def push_or_update(self, slot: int, priority: float) -> None:
        self.heap.push([(priority, slot)])
        self.oracle[slot] = priority

    @rule(slot=SLOTS)
    def remove(self, slot: int) -> None:
        if slot in self.oracle:
            self.heap.remove(slot)
            del self.oracle[slot]
        else:
            with pytest.raises(KeyError):
                self.heap.remove(slot)

    def in_order(self, most: float = math.inf) -> list[int]:
        slots = (slot for slot, priority in self.oracle.items() if priority <= most)
        return sorted(slots, key=lambda slot: (self.oracle[slot], slot))

    @precondition(lambda self: self.oracle)
    @rule()
    def pop(self) -> None:
        expected = self.in_order()[0]
        assert self.heap.peek() == expected
        assert self.heap.pop() == expected
        del self.oracle[expected]

    @rule(n=st.integers(0, 6), most=MOST)
    def take(self, n: int, most: float) -> None:
        taken = self.heap.take(n, most)
        assert taken == self.in_order(most)[:n]
        for slot in taken:
            del self.oracle[slot]

    @rule(n=st.integers(0, 6), most=MOST, gone=st.sets(st.integers(0, 5)))
    def look_at_the_nearest_and_discard_some(self, n: int, most: float, gone: set[int]) -> None:
        near = self.heap.nearest(n, most)
        assert near == self.in_order(most)[:n]
        slots = [slot for i, slot in enumerate(near) if i in gone]
        self.heap.discard([*slots, 99])  # 99 was never there
        for slot in slots:
            del self.oracle[slot]

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
        held = len(self.heap._entries) + len(self.heap._front)
        assert held == len(self.heap) + self.heap._dead
        assert held <= 65 + 2 * 12  # dead entries do not pile up
        assert self.heap._front == sorted(self.heap._front)
        if self.heap._front and self.heap._entries:
            assert self.heap._front[-1] <= self.heap._entries[0]

    def teardown(self) -> None:
        drained = [self.heap.pop() for _ in range(len(self.heap))]
        assert drained == self.in_order()


TestHeap = HeapMachine.TestCase
TestHeap.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@given(st.floats(allow_nan=False), st.floats(allow_nan=False))
def test_sortable_keeps_the_order(a: float, b: float) -> None:
    assert (sortable(a) < sortable(b)) == (a < b)
    assert (sortable(a) == sortable(b)) == (a == b)
    assert 0 <= sortable(a) < 2**64


@pytest.mark.parametrize("met", [1, 20_000])
def test_a_long_front_goes_back_into_the_heap(met: int) -> None:
    """What is nearer than all that was met goes to the front, where it would slow down what comes next."""
    heap, size = LazyHeap("d"), 20_000
    heap.push([(1.0, slot) for slot in range(size)])
    assert heap.nearest(met) == list(range(met))
    heap.push([(0.5, slot) for slot in range(size, 2 * size)])
    assert len(heap._front) <= 4096
    assert heap.nearest(3 * size) == [*range(size, 2 * size), *range(size)]
    heap.discard(range(0, 2 * size, 3))
    assert len(heap._front) <= 4096
    assert heap.take(2 * size) == [slot for slot in [*range(size, 2 * size), *range(size)] if slot % 3]
    assert not heap

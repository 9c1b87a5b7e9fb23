"""A heap that forgets items in O(1) and drops their entries when it meets them."""

from __future__ import annotations

import math
import struct
from bisect import bisect_right, insort
from collections.abc import Iterable, Sequence
from heapq import heapify, heappop, heappush
from typing import Any

_DOUBLE, _SIGNED = struct.Struct(">d"), struct.Struct(">q")
_LAST = b"\xff" * 64
"""Sorts behind whatever follows the first number of a priority."""
_SLACK = 64
"""A heap of fewer dead entries is not worth cleaning."""
_LONGEST = 4096
"""Entries of a front."""


def sortable(number: float) -> int:
    """A "Q" in the order of the numbers, for those that may be negative."""
    bits: int = _SIGNED.unpack(_DOUBLE.pack(number + 0.0))[0]  # of -0.0 those of 0.0
    return bits + 2**63 if bits >= 0 else ~bits


class LazyHeap:
    """Min-heap of small integers ("slots") by priority; push, update and pop cost O(log N) amortised, remove O(1).

    An entry is the priority and the slot (equal priorities go by slot) packed into bytes that sort as the numbers do:
    one object to compare where a tuple of numbers has five, scattered over a memory that no cache holds.

    What has been removed or updated stays inside as a dead entry until it is met at the top, or half of the heap is
    dead. Entries met at the top stay in `front`, a short sorted list before the heap proper: so the nearest
    can be looked at again and again without being popped and pushed.

    Misuse raises what a list or dict would: IndexError on an empty heap, KeyError for a missing slot.

    Args:
        priority: the kinds of its numbers: "d" a float of 0 or more, "Q" an integer of 0 or more, or a `sortable`.
    """

    def __init__(self, priority: str) -> None:
        self._pack = struct.Struct(f">{priority}I").pack
        self._slot = struct.Struct(f">{8 * len(priority)}xI")
        self._front: list[bytes] = []
        self._entries: list[bytes] = []  # none before any of `_front`
        self._live: list[bytes | None] = []  # by slot: its one valid entry
        self._size = 0
        self._dead = 0  # entries in the two lists that are not live

    def __len__(self) -> int:
        return self._size

    def __contains__(self, slot: int) -> bool:
        return slot < len(self._live) and self._live[slot] is not None

    def push(self, rows: Sequence[tuple[Any, ...]]) -> None:
        """Add slots, or move them to a new priority. A row is the priority's numbers and the slot."""
        live, front, entries, pack = self._live, self._front, self._entries, self._pack
        furthest = front[-1] if front else b""
        new = 0
        for row in rows:
            slot, entry = row[-1], pack(*row)
            if slot >= len(live):
                live.extend([None] * (slot + 1 - len(live)))
            if live[slot] is None:
                new += 1
            live[slot] = entry
            if entry < furthest:
                insort(front, entry)
                if len(front) > _LONGEST:
                    self._shorten_front()
                    furthest = front[-1]
            else:
                heappush(entries, entry)
        self._size += new
        self._dead += len(rows) - new
        self._tidy()

    def peek(self) -> int:
        """The slot of smallest priority. Raises IndexError when empty."""
        return self.nearest(1)[0]

    def pop(self) -> int:
        """Remove and return the slot of smallest priority. Raises IndexError when empty."""
        live = self._live
        while True:
            entry = self._front.pop(0) if self._front else heappop(self._entries)
            slot: int = self._slot.unpack(entry)[0]
            if live[slot] is entry:
                live[slot] = None
                self._size -= 1
                return slot
            self._dead -= 1

    def nearest(self, n: int, most: float = math.inf) -> list[int]:
        """The up to `n` slots of smallest priority, in order, whose priority begins with at most `most`.

        `most` is for priorities that begin with a "d".
        """
        if n <= 0:
            return []
        self._fill_front(n)
        front = self._front
        end = min(n, len(front))
        if most < math.inf:
            end = bisect_right(front, _DOUBLE.pack(most) + _LAST, hi=end)
        return self._slots(front[:end])

    def take(self, n: int, most: float = math.inf) -> list[int]:
        """`nearest`, which are removed."""
        slots, live = self.nearest(n, most), self._live
        for slot in slots:
            live[slot] = None
        del self._front[: len(slots)]
        self._size -= len(slots)
        return slots

    def remove(self, slot: int) -> None:
        """Take `slot` out. Raises KeyError when it is not there."""
        if slot not in self:
            raise KeyError(slot)
        self.discard([slot])

    def discard(self, slots: Iterable[int]) -> None:
        """Take out those of `slots` that are there."""
        live, known, gone = self._live, len(self._live), 0
        for slot in slots:
            if slot < known and live[slot] is not None:
                live[slot] = None
                gone += 1
        self._size -= gone
        self._dead += gone
        self._tidy()

    def _slots(self, entries: list[bytes]) -> list[int]:
        return [slot for (slot,) in self._slot.iter_unpack(b"".join(entries))]

    def _fill_front(self, n: int) -> None:
        """Have the first `n` live entries in front."""
        live, entries, unpack = self._live, self._entries, self._slot.unpack
        held = len(self._front) + len(entries)
        slots = self._slots(self._front)
        front = [entry for entry, slot in zip(self._front, slots, strict=True) if live[slot] is entry]
        while len(front) < n and entries:
            entry = heappop(entries)
            if live[unpack(entry)[0]] is entry:
                front.append(entry)
        self._dead -= held - len(front) - len(entries)
        self._front = front

    def _shorten_front(self) -> None:
        """A long list is slow to insert into."""
        for entry in self._front[_LONGEST // 2 :]:
            heappush(self._entries, entry)
        del self._front[_LONGEST // 2 :]

    def _tidy(self) -> None:
        if self._dead > self._size + _SLACK:
            self._entries = [entry for entry in self._live if entry is not None]
            self._front = []
            self._dead = 0
            heapify(self._entries)
        elif len(self._front) > _LONGEST:
            self._shorten_front()

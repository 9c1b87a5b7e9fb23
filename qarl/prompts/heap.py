"""A heap that forgets items in O(1) and drops their entries when it meets them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from heapq import heapify, heappop, heappush
from typing import Any

Entry = tuple[Any, ...]
"""Priority, then the item: equal priorities go by item."""


class LazyHeap:
    """Min-heap of small integers ("slots") by priority; push, update and pop cost O(log N) amortised, remove O(1).

    What has been removed or updated stays inside as a dead entry until it reaches the top, or a push finds a fifth
    of the heap dead. What is put back lies in a small heap of its own: such entries come from the top, and in the
    large heap each would climb all the way up, only to be popped by the next draw.

    Misuse raises what a list or dict would: IndexError on an empty heap, KeyError for a missing slot.
    """

    def __init__(self) -> None:
        self._entries: list[Entry] = []
        self._returned: list[Entry] = []
        self._live: list[Entry | None] = []  # by slot: its one valid entry
        self._size = 0
        self._dead = 0  # entries in the two heaps that are not live

    def __len__(self) -> int:
        return self._size

    def __contains__(self, slot: int) -> bool:
        return slot < len(self._live) and self._live[slot] is not None

    def push(self, slot: int, *priority: Any) -> None:
        """Add `slot`, or move it to a new priority."""
        live, entry = self._live, (*priority, slot)
        if slot >= len(live):
            live.extend([None] * (slot + 1 - len(live)))
        if live[slot] is None:
            self._size += 1
        else:
            self._dead += 1
        live[slot] = entry
        heappush(self._entries, entry)
        if 4 * self._dead > 256 + self._size:
            self._compact()

    def top(self) -> Entry:
        """Priority and slot of the smallest entry. Raises IndexError when empty."""
        return self._nearest()[0]

    def peek(self) -> int:
        """The slot of smallest priority. Raises IndexError when empty."""
        slot: int = self.top()[-1]
        return slot

    def pop(self) -> int:
        """Remove and return the slot of smallest priority. Raises IndexError when empty."""
        entry = heappop(self._nearest())
        slot: int = entry[-1]
        self._live[slot] = None
        self._size -= 1
        return slot

    def take(self, n: int = 1, most: float = math.inf) -> list[Entry]:
        """Remove and return the up to `n` smallest entries whose priority begins with at most `most`, in order."""
        live = self._live
        taken: list[Entry] = []
        for _ in range(min(n, self._size)):
            heap = self._nearest()
            if heap[0][0] > most:
                break
            taken.append(entry := heappop(heap))
            live[entry[-1]] = None
            self._size -= 1
        return taken

    def put_back(self, entries: Iterable[Entry]) -> None:
        """Undo `take`."""
        live, returned = self._live, self._returned
        for entry in entries:
            live[entry[-1]] = entry
            self._size += 1
            heappush(returned, entry)

    def remove(self, slot: int) -> None:
        """Take `slot` out. Raises KeyError when it is not there."""
        if not self.discard(slot):
            raise KeyError(slot)

    def discard(self, slot: int) -> bool:
        """Take `slot` out; False when it is not there."""
        live = self._live
        if slot >= len(live) or live[slot] is None:
            return False
        live[slot] = None
        self._size -= 1
        self._dead += 1
        return True

    def _nearest(self) -> list[Entry]:
        """Of the two heaps the one with the smallest live entry, which is then on its top."""
        live, entries, returned = self._live, self._entries, self._returned
        for heap in (entries, returned):
            while heap and live[heap[0][-1]] is not heap[0]:
                heappop(heap)
                self._dead -= 1
        return returned if returned and (not entries or returned[0] < entries[0]) else entries

    def _compact(self) -> None:
        self._entries = [entry for entry in self._live if entry is not None]
        self._returned = []
        self._dead = 0
        heapify(self._entries)

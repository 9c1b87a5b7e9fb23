"""A heap that forgets items in O(1) and drops their entries when it meets them."""

from __future__ import annotations

import heapq
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
        live[slot] = entry
        heapq.heappush(self._entries, entry)
        if len(self._entries) + len(self._returned) > 64 + 1.25 * self._size:
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
        slot: int = self.take()[-1]
        return slot

    def take(self) -> Entry:
        """Remove and return the smallest entry. Raises IndexError when empty."""
        entry = heapq.heappop(self._nearest())
        self._live[entry[-1]] = None
        self._size -= 1
        return entry

    def put_back(self, entry: Entry) -> None:
        """Undo `take`."""
        self._live[entry[-1]] = entry
        self._size += 1
        heapq.heappush(self._returned, entry)

    def remove(self, slot: int) -> None:
        """Take `slot` out. Raises KeyError when it is not there."""
        if slot not in self:
            raise KeyError(slot)
        self._live[slot] = None
        self._size -= 1

    def _nearest(self) -> list[Entry]:
        """Of the two heaps the one with the smallest live entry, which is then on its top."""
        live, entries, returned = self._live, self._entries, self._returned
        while entries and live[entries[0][-1]] is not entries[0]:
            heapq.heappop(entries)
        while returned and live[returned[0][-1]] is not returned[0]:
            heapq.heappop(returned)
        return returned if returned and (not entries or returned[0] < entries[0]) else entries

    def _compact(self) -> None:
        self._entries = [entry for entry in self._live if entry is not None]
        self._returned = []
        heapq.heapify(self._entries)

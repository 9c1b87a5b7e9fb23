"""A heap that forgets items in O(1) and drops their entries when it meets them."""

from __future__ import annotations

import heapq
from typing import Any

Entry = tuple[Any, ...]
"""Priority, then the item: equal priorities go by item."""


class LazyHeap:
    """Min-heap of small integers ("slots") by priority; push, update and pop cost O(log N) amortised, remove O(1).

    What has been removed or updated stays inside as a dead entry until it reaches the top, or a push finds a fifth
    of the heap dead. Misuse raises what a list or dict would: IndexError on an empty heap, KeyError for a missing
    slot.
    """

    def __init__(self) -> None:
        self._entries: list[Entry] = []
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
        if len(self._entries) > 64 + 1.25 * self._size:
            self._compact()

    def top(self) -> Entry:
        """Priority and slot of the smallest entry. Raises IndexError when empty."""
        entries, live = self._entries, self._live
        while live[entries[0][-1]] is not entries[0]:
            heapq.heappop(entries)
        return entries[0]

    def peek(self) -> int:
        """The slot of smallest priority. Raises IndexError when empty."""
        slot: int = self.top()[-1]
        return slot

    def pop(self) -> int:
        """Remove and return the slot of smallest priority. Raises IndexError when empty."""
        slot = self.peek()
        heapq.heappop(self._entries)
        self._live[slot] = None
        self._size -= 1
        return slot

    def remove(self, slot: int) -> None:
        """Take `slot` out. Raises KeyError when it is not there."""
        if slot not in self:
            raise KeyError(slot)
        self._live[slot] = None
        self._size -= 1

    def _compact(self) -> None:
        self._entries = [entry for entry in self._live if entry is not None]
        heapq.heapify(self._entries)

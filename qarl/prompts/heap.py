"""A binary heap that finds its items again: any of them can be updated or removed in O(log N)."""

from __future__ import annotations

Priority = tuple[float, ...]


class IndexedHeap:
    """Min-heap of distinct items by priority; give distances to a boundary and its top is the nearest item.

    Priorities that are never equal make the order of pops independent of the order of pushes. Misuse raises what a
    list or dict would: IndexError on an empty heap, KeyError for an item that is missing or already there.
    """

    def __init__(self) -> None:
        self._entries: list[tuple[Priority, str]] = []
        self._position: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, item: str) -> bool:
        return item in self._position

    def push(self, item: str, priority: Priority) -> None:
        """Add `item`, O(log N). Raises KeyError when it is there already."""
        if item in self._position:
            raise KeyError(item)
        self._entries.append((priority, item))
        self._rise(len(self._entries) - 1)

    def peek(self) -> str:
        """The item of smallest priority, O(1). Raises IndexError when empty."""
        return self._entries[0][1]

    def pop(self) -> str:
        """Remove and return the item of smallest priority, O(log N). Raises IndexError when empty."""
        item = self.peek()
        self.remove(item)
        return item

    def update(self, item: str, priority: Priority) -> None:
        """Move `item` to a new priority, O(log N). Raises KeyError when it is not there."""
        index = self._position[item]
        self._entries[index] = (priority, item)
        self._sink(self._rise(index))

    def remove(self, item: str) -> None:
        """Take `item` out, O(log N). Raises KeyError when it is not there."""
        index = self._position.pop(item)
        last = self._entries.pop()
        if index < len(self._entries):
            self._entries[index] = last
            self._sink(self._rise(index))

    def _rise(self, index: int) -> int:
        """Move the entry at `index` up to where it belongs; returns that index."""
        entry = self._entries[index]
        while index > 0:
            parent = (index - 1) // 2
            if self._entries[parent] <= entry:
                break
            self._set(index, self._entries[parent])
            index = parent
        self._set(index, entry)
        return index

    def _sink(self, index: int) -> None:
        """Move the entry at `index` down to where it belongs."""
        entry = self._entries[index]
        while (child := 2 * index + 1) < len(self._entries):
            if child + 1 < len(self._entries) and self._entries[child + 1] < self._entries[child]:
                child += 1
            if entry <= self._entries[child]:
                break
            self._set(index, self._entries[child])
            index = child
        self._set(index, entry)

    def _set(self, index: int, entry: tuple[Priority, str]) -> None:
        self._entries[index] = entry
        self._position[entry[1]] = index

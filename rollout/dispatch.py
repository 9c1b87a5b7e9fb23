"""Which worker samples which group."""

from collections import deque
from collections.abc import Iterator


class Dispatcher:
    """Groups wait here until a worker has room. They go out whole, so that their requests share the prompt's keys and
    values, in order, and to the worker with the fewest unfinished requests.

    A worker has room while it has fewer than `capacity` unfinished requests. What waits here goes to whichever worker
    has room first, so that none is idle while groups wait.
    """

    def __init__(self, num_workers: int, capacity: int) -> None:
        self._capacity = capacity
        self._sizes: dict[int, int] = {}
        self._waiting: deque[int] = deque()
        self._given: list[list[int]] = [[] for _ in range(num_workers)]
        self._worker: dict[int, int] = {}  # of each group that one has
        self._left: dict[int, int] = {}  # unfinished requests of such a group
        self._loads = [0] * num_workers

    def add(self, number: int, size: int, first: bool = False) -> None:
        """Take in a group of `size` requests, behind all that wait, or `first`."""
        self._sizes[number] = size
        if first:
            self._waiting.appendleft(number)
        else:
            self._waiting.append(number)

    def assign(self) -> Iterator[tuple[int, int]]:
        """(group, worker) for all groups that workers have room for."""
        while self._waiting:
            worker = min(range(len(self._loads)), key=self._loads.__getitem__)
            if self._loads[worker] >= self._capacity:
                return
            number = self._waiting.popleft()
            self._given[worker].append(number)
            self._worker[number], self._left[number] = worker, self._sizes[number]
            self._loads[worker] += self._sizes[number]
            yield number, worker

    def waiting(self) -> set[int]:
        """Groups that no worker has."""
        return set(self._waiting)

    def load(self, worker: int) -> int:
        """Unfinished requests of a worker."""
        return self._loads[worker]

    def given(self, worker: int) -> list[int]:
        """Groups that a worker has, oldest first."""
        return list(self._given[worker])

    def finish_one(self, number: int) -> None:
        """A request of a group is finished."""
        self._left[number] -= 1
        self._loads[self._worker[number]] -= 1

    def remove(self, number: int) -> None:
        """A group is finished, or nobody wants it any more."""
        worker = self._worker.pop(number, None)
        del self._sizes[number]
        if worker is None:
            self._waiting.remove(number)
        else:
            self._given[worker].remove(number)
            self._loads[worker] -= self._left.pop(number)

    def lose(self, worker: int) -> None:
        """A worker has died: its groups wait again, before all others."""
        lost, self._given[worker], self._loads[worker] = self._given[worker], [], 0
        for number in lost:
            del self._worker[number], self._left[number]
        self._waiting.extendleft(reversed(lost))

"""How many responses each drawn prompt gets."""

import heapq
from collections.abc import Sequence


def allocate(spread_P: Sequence[float], budget: int, least: int, most: int) -> list[int]:
    """Group sizes n_i that minimise sum_i spread_i^2 / n_i, the variance of the group means (Neyman, 1934).

    The sizes add up to `budget` and lie within `least` and `most`. Each further response goes to the group where it
    lowers the sum most, by spread_i^2 / (n_i (n_i + 1)); this greedy choice is optimal (Wright, 2012). O(budget log P).

    Args:
        spread_P: standard deviation of a response's reward; only the proportions matter.
        budget: total number of responses, within P * least and P * most.
    """
    sizes = [least] * len(spread_P)

    def turn(i: int) -> tuple[float, int, int]:
        return -(spread_P[i] ** 2) / (sizes[i] * (sizes[i] + 1)), sizes[i], i

    queue = [turn(i) for i in range(len(sizes)) if least < most]
    heapq.heapify(queue)
    for _ in range(budget - sum(sizes)):
        i = queue[0][-1]
        sizes[i] += 1
        if sizes[i] < most:
            heapq.heapreplace(queue, turn(i))
        else:
            heapq.heappop(queue)
    return sizes

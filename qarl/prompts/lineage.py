"""Which prompt was made from which, and success rates estimated from relatives.

We assume that a child made `difficulty` times as hard as its parent has success rate g(v) = v**difficulty when the
parent has success rate v. So 1 stays 1, 0 stays 0, difficulty 1 changes nothing; along a path difficulties multiply.
"""

from collections.abc import Iterator, Mapping
from math import fsum
from typing import Literal

from qarl.errors import DataError

MAX_DIFFICULTY = 1e3
"""Largest difficulty of one link; the smallest is its inverse."""


def child_rate(parent_rate: float, difficulty: float) -> float:
    """g: the success rate expected of a child."""
    return parent_rate**difficulty


def parent_rate(child_rate: float, difficulty: float) -> float:
    """The inverse of g: the success rate expected of a parent."""
    return child_rate ** (1.0 / difficulty)


class Forest:
    """Parents and children by id. It holds only prompts with a relative; link and remove cost O(relatives)."""

    def __init__(self) -> None:
        self._parent: dict[str, tuple[str, float]] = {}
        self._children: dict[str, dict[str, float]] = {}

    def links(self) -> Iterator[tuple[str, str, float]]:
        """(child, parent, difficulty), in the order of linking."""
        return ((child, parent, difficulty) for child, (parent, difficulty) in self._parent.items())

    def parents(self) -> Iterator[str]:
        """Nodes with children."""
        return iter(self._children)

    def nodes(self) -> set[str]:
        return self._parent.keys() | self._children.keys()

    def link(self, child: str, parent: str, difficulty: float = 1.0) -> None:
        """Make `child` a child of `parent`; O(1), or O(depth) when `child` has children.

        Raises DataError: `child` has a parent, `difficulty` is not within its bounds, or the link would close a cycle.
        """
        where = f"lineage of prompt '{child}'"
        if not 1 / MAX_DIFFICULTY <= difficulty <= MAX_DIFFICULTY:  # NaN fails too
            raise DataError(f"difficulty {difficulty} is not within 1/{MAX_DIFFICULTY:g} and {MAX_DIFFICULTY:g}", where)
        if child in self._parent:
            raise DataError(f"it is already a child of '{self._parent[child][0]}'", where)
        ancestor = parent
        while child in self._children and ancestor != child and ancestor in self._parent:
            ancestor = self._parent[ancestor][0]
        if ancestor == child:
            raise DataError(f"'{parent}' descends from it: a cycle", where)
        self._set(child, parent, difficulty)

    def remove(self, node: str) -> None:
        """Remove `node`. Its children become children of its parent, with difficulties multiplied, or roots."""
        above = self._parent.pop(node, None)
        if above:
            siblings = self._children[above[0]]
            del siblings[node]
            if not siblings:
                del self._children[above[0]]
        for child, difficulty in self._children.pop(node, {}).items():
            del self._parent[child]
            if above:
                composed = min(max(difficulty * above[1], 1 / MAX_DIFFICULTY), MAX_DIFFICULTY)
                self._set(child, above[0], composed)

    def aggregate(self, values: Mapping[str, float], mode: Literal["children", "path"]) -> dict[str, float]:
        """Success rates re-estimated from the leaves up, for every node, O(V + E), without recursion.

        v_u' = 1/2 v_u + 1/2 sum_c w_c g^-1(v_c') with w_c equal ("children") or by the number of leaves below
        ("path"); leaves keep their value. The sums are exact, so the order of linking does not matter.
        Raises KeyError: `values` lacks a node.
        """
        result: dict[str, float] = {}
        leaves: dict[str, int] = {}
        for node in reversed(self._parents_first()):
            children = self._children.get(node)
            if not children:
                result[node], leaves[node] = values[node], 1
                continue
            leaves[node] = sum(leaves[child] for child in children)
            weight = {c: leaves[c] if mode == "path" else 1 for c in children}
            implied = {c: parent_rate(result[c], difficulty) for c, difficulty in children.items()}
            below = fsum(weight[c] * implied[c] for c in children) / sum(weight.values())
            below = min(max(below, min(implied.values())), max(implied.values()))  # the division may round past them
            result[node] = (values[node] + below) / 2  # halves would vanish among subnormal numbers
        return result

    def _parents_first(self) -> list[str]:
        order = [node for node in self._children if node not in self._parent]
        for node in order:  # grows while we walk it
            order.extend(self._children.get(node, ()))
        return order

    def _set(self, child: str, parent: str, difficulty: float) -> None:
        self._parent[child] = (parent, difficulty)
        self._children.setdefault(parent, {})[child] = difficulty

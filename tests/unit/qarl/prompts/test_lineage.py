"""The forest against a recursive oracle that reads the definition."""

from __future__ import annotations

import math
import random
from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qarl.errors import DataError
from qarl.prompts.lineage import MAX_DIFFICULTY, Forest, child_rate, parent_rate
from tests.support.pool import MODES, Links, Mode, make_forest


@st.composite
def forests(draw: st.DrawFn, difficulties: st.SearchStrategy[float]) -> Links:
    """Links of a forest: every node but the first few has an earlier one as parent."""
    size = draw(st.integers(2, 14))
    parents = {i: draw(st.integers(0, i - 1)) for i in range(1, size) if draw(st.integers(0, 4))}
    return [(f"n{child}", f"n{parent}", draw(difficulties)) for child, parent in parents.items()]


ANY = forests(st.floats(0.25, 4.0))
EQUAL = forests(st.just(1.0))


def random_values(forest: Forest, rng: random.Random) -> dict[str, float]:
    return {node: rng.choice([0.0, 1.0, rng.random()]) for node in sorted(forest.nodes())}


def oracle(links: Links, values: dict[str, float], node: str, mode: Mode) -> float:
    def leaves(n: str) -> int:
        return sum(leaves(c) for c, p, _ in links if p == n) or 1

    below = [(child, d) for child, parent, d in links if parent == node]
    if not below:
        return values[node]
    weights = [leaves(child) if mode == "path" else 1 for child, _ in below]
    said = [oracle(links, values, child, mode) ** (1 / d) for child, d in below]
    return values[node] / 2 + sum(w * s for w, s in zip(weights, said, strict=True)) / sum(weights) / 2


@given(ANY, st.randoms(use_true_random=False), st.sampled_from(MODES))
def test_aggregate_is_the_definition_in_any_order(links: Links, rng: random.Random, mode: Mode) -> None:
    forest = make_forest(links)
    values = random_values(forest, rng)
    result = forest.aggregate(values, mode)
    assert result == {node: pytest.approx(oracle(links, values, node, mode)) for node in forest.nodes()}
    shuffled = make_forest(rng.sample(links, len(links)))
    assert shuffled.aggregate(values, mode) == result  # to the bit


@given(EQUAL, st.randoms(use_true_random=False), st.sampled_from(MODES))
def test_equal_difficulty_stays_within_the_values(links: Links, rng: random.Random, mode: Mode) -> None:
    forest = make_forest(links)
    values = random_values(forest, rng)
    if links:
        assert all(min(values.values()) <= v <= max(values.values()) for v in forest.aggregate(values, mode).values())


@given(ANY, st.data())
def test_cycles_and_second_parents_are_rejected(links: Links, data: st.DataObject) -> None:
    forest = make_forest(links)
    nodes = sorted(forest.nodes()) or ["n0"]
    child, parent = data.draw(st.sampled_from(nodes)), data.draw(st.sampled_from(nodes))
    above, at = {c: p for c, p, _ in links}, parent
    while at != child and at in above:
        at = above[at]
    before = list(forest.links())
    if child in above or at == child:
        with pytest.raises(DataError, match="already a child" if child in above else "cycle"):
            forest.link(child, parent)
        assert list(forest.links()) == before
    else:
        forest.link(child, parent)
        assert (child, parent, 1.0) in forest.links()


@given(ANY, st.data())
def test_remove_prunes_and_composes_difficulties(links: Links, data: st.DataObject) -> None:
    forest = make_forest(links)
    gone = data.draw(st.sampled_from(sorted(forest.nodes()) or ["n0"]))
    forest.remove(gone)
    above = {c: (p, d) for c, p, d in links}
    expected = {}
    for child, (parent, difficulty) in above.items():
        if child != gone and parent != gone:
            expected[child] = (parent, difficulty)
        elif parent == gone and gone in above:
            expected[child] = (above[gone][0], pytest.approx(difficulty * above[gone][1]))
    assert {c: (p, d) for c, p, d in forest.links()} == expected
    assert forest.nodes() == {*expected, *(p for p, _ in expected.values())}


@given(st.floats(0.001, 1.0), st.floats(0.25, 4.0))
def test_the_map_is_inverted_on_the_way_up(rate: float, difficulty: float) -> None:
    assert parent_rate(child_rate(rate, difficulty), difficulty) == pytest.approx(rate)
    assert 0.0 <= child_rate(rate, difficulty) <= 1.0
    assert (child_rate(rate, difficulty) <= rate) == (difficulty >= 1.0) or rate == pytest.approx(1.0)


@pytest.mark.parametrize("mode", MODES)
def test_a_chain_of_ten_thousand(mode: Mode) -> None:
    depth = 10_000
    forest = Forest()
    for i in range(depth):
        forest.link(f"n{i + 1}", f"n{i}")
    values = {f"n{i}": float(i == depth) for i in range(depth + 1)}
    result = forest.aggregate(values, mode)
    assert result[f"n{depth - 1}"] == 0.5
    assert result["n0"] == 0.0 or math.isclose(result["n0"], 0.5**depth)
    with pytest.raises(DataError, match="cycle"):
        forest.link("n0", f"n{depth}")


def test_path_weighs_by_leaves() -> None:
    links: Links = [("a", "root", 1.0), ("b", "root", 1.0), *((f"a{i}", "a", 1.0) for i in range(3))]
    values = dict.fromkeys(("root", "a", "a0", "a1", "a2"), 1.0) | {"b": 0.0}
    assert make_forest(links).aggregate(values, "children")["root"] == (1.0 + fmean((1.0, 0.0))) / 2
    assert make_forest(links).aggregate(values, "path")["root"] == (1.0 + 3 / 4) / 2


@pytest.mark.parametrize("difficulty", [0.0, -1.0, math.nan, math.inf, 2 * MAX_DIFFICULTY])
def test_impossible_difficulties(difficulty: float) -> None:
    with pytest.raises(DataError, match="difficulty"):
        Forest().link("child", "parent", difficulty)

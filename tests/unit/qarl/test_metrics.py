"""Metrics merge by their own reduction; seeds are the same everywhere."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qarl.metrics import Histogram, Metric, Metrics, effective_sample_size, maximum, mean, merge
from qarl.seeds import derive_seed

# Eighths: sums of them are exact, so that equality does not depend on the order.
VALUES = st.integers(-80, 80).map(lambda n: n / 8)
PARTS = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "mean": st.builds(mean, VALUES, st.integers(0, 8)),
            "max": st.builds(maximum, VALUES),
            "sum": st.builds(lambda value: Metric(value, reduction="sum"), VALUES),
        },
    ),
    max_size=6,
)


@given(PARTS, st.randoms(use_true_random=False))
def test_merge_is_the_reduction_over_all_parts_in_any_order(parts: list[Metrics], rng: random.Random) -> None:
    merged = merge(parts)
    means = [part["mean"] for part in parts if "mean" in part]
    weight = sum(metric.weight for metric in means)
    expected: dict[str, float] = {}
    if weight:
        expected["mean"] = sum(metric.value for metric in means) / weight
    if sums := [part["sum"].value for part in parts if "sum" in part]:
        expected["sum"] = sum(sums)
    if maxima := [part["max"].value for part in parts if "max" in part]:
        expected["max"] = max(maxima)
    assert merged == expected
    rng.shuffle(parts)
    assert merge(parts) == merged


def test_a_mean_weighs_its_parts() -> None:
    assert merge([{"loss": mean(6.0, 3.0)}, {"loss": mean(4.0, 1.0)}]) == {"loss": 2.5}


def test_a_mean_of_no_weight_is_left_out() -> None:
    assert merge([{"loss": mean(0.0, 0.0), "x": maximum(1.0)}]) == {"x": 1.0}


def test_one_name_with_two_reductions_is_an_error() -> None:
    with pytest.raises(ValueError, match="metric loss has two reductions"):
        merge([{"loss": mean(1.0, 1.0)}, {"loss": maximum(1.0)}])


@given(st.lists(st.lists(st.floats(1e-3, 1e3), max_size=5), min_size=1, max_size=4).filter(any))
def test_the_sample_size_of_all_parts_is_that_of_the_whole(parts: list[list[float]]) -> None:
    metrics = [{"ess": effective_sample_size(sum(w), sum(x * x for x in w), len(w))} for w in parts]
    whole = [x for w in parts for x in w]
    expected = sum(whole) ** 2 / (len(whole) * sum(x * x for x in whole))
    merged = merge(metrics)["ess"]
    assert merged == pytest.approx(expected, rel=1e-9)
    assert 1 / len(whole) <= expected * (1 + 1e-9)
    assert expected <= 1 + 1e-9


def test_the_sample_size_by_hand() -> None:
    assert merge([{"ess": effective_sample_size(4.0, 4.0, 4)}]) == {"ess": 1.0}
    assert merge([{"ess": effective_sample_size(2.0, 4.0, 4)}]) == {"ess": 0.25}
    assert merge([{"ess": effective_sample_size(0.0, 0.0, 4)}]) == {}


def test_histograms_add_up_and_must_share_their_edges() -> None:
    one, other = Histogram((0.0, 1.0, 2.0), (1, 2)), Histogram((0.0, 1.0, 2.0), (3, 0))
    assert merge([{"h": one}, {"h": other}, {}]) == {"h": Histogram((0.0, 1.0, 2.0), (4, 2))}
    for wrong in (Histogram((0.0, 1.5, 2.0), (1, 2)), mean(1.0, 1.0)):
        with pytest.raises(ValueError, match="metric h has two reductions"):
            merge([{"h": one}, {"h": wrong}])


NAMES = st.lists(st.one_of(st.integers(), st.text(st.characters(codec="utf-8", exclude_characters="|"))), max_size=4)


@given(st.integers(), NAMES)
def test_seeds_fit_31_bits_and_repeat(seed: int, names: list[object]) -> None:
    assert 0 <= derive_seed(seed, *names) < 2**31
    assert derive_seed(seed, *names) == derive_seed(seed, *names)


def test_seeds_differ_by_every_name() -> None:
    seeds = {derive_seed(seed, "train", step, f"p{i}") for seed in range(5) for step in range(20) for i in range(20)}
    assert len(seeds) == 2000
    assert derive_seed(1, "a", "b") != derive_seed(1, "b", "a")


def test_seeds_are_the_same_on_every_machine() -> None:
    """The hexadecimal numbers are those of coreutils: `printf '0|train|1|p0|2' | b2sum -l 32`."""
    assert derive_seed(0) == 0x34069224 >> 1
    assert derive_seed(0, "train", 1, "p0", 2) == 0x878295D9 >> 1

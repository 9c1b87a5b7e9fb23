"""Mismatch between learner and sampler."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from qarl.mismatch import Mismatch, by_quartile, quartiles

LOGPROBS = arrays(np.float32, st.integers(1, 8), elements=st.floats(-20, 0, width=32))


def split(values: list[float], *lengths: int) -> list[np.ndarray]:
    return np.split(np.array(values, dtype=np.float32), np.cumsum(lengths)[:-1])


def test_by_hand() -> None:
    learner = split([-1.0, -2.0, -3.0], 2, 1)
    sampler = split([-1.5, -2.0, -2.0], 2, 1)
    mismatch = Mismatch.between(learner, sampler)
    assert mismatch.abs_mean == pytest.approx(0.5)
    assert mismatch.abs_p99 == pytest.approx(0.99)  # linear between 0.5 and 1: 0.98 of the way
    assert mismatch.abs_max == 1.0
    assert mismatch.k1 == pytest.approx((1 - 0.5) / 3)
    assert mismatch.k3 == pytest.approx((math.exp(0.5) + math.exp(-1) + 1 - 3 + 0.5) / 3)


def test_tokens_count_alike_however_they_are_split() -> None:
    learner, sampler = [-1.0, -2.0, -3.0, -4.0], [-1.1, -2.5, -2.0, -4.0]
    whole = Mismatch.between(split(learner, 4), split(sampler, 4), [0.2])
    parts = Mismatch.between(split(learner, 1, 0, 3), split(sampler, 1, 0, 3), [0.2])
    of_tokens = ("abs_mean", "abs_p99", "abs_max", "k1", "k3", "above")
    assert [getattr(parts, name) for name in of_tokens] == [getattr(whole, name) for name in of_tokens]


@given(learner=LOGPROBS, seed=st.integers(0, 1000), size=st.sampled_from([1e-7, 1e-3, 1.0]))
@settings(deadline=None)
def test_bounds(learner: np.ndarray, seed: int, size: float) -> None:
    noise = np.random.default_rng(seed).normal(size=learner.shape) * size
    mismatch = Mismatch.between([learner], [(learner + noise).astype(np.float32)])
    assert 0 <= mismatch.abs_mean <= mismatch.abs_max * (1 + 1e-12)
    assert mismatch.abs_p99 <= mismatch.abs_max
    assert abs(mismatch.k1) <= mismatch.abs_mean * (1 + 1e-12)
    assert mismatch.k3 >= 0


@given(learner=LOGPROBS)
@settings(deadline=None)
def test_equal_policies_have_none(learner: np.ndarray) -> None:
    same = Mismatch.between([learner] * 3, [learner.copy()] * 3, [1e-9])
    assert same == Mismatch(0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0, {1e-9: 0.0})


def test_tiny_differences_keep_their_divergence() -> None:
    """k3 is d^2/2 to first order: one float32 step at -1e-3 is 1.2e-10, lost in `exp(d) - 1` to cancellation."""
    sampler = np.full(3, -1e-3, dtype=np.float32)
    learner = np.nextafter(sampler, np.float32(-1))
    step = float(learner[0]) - float(sampler[0])
    assert Mismatch.between([learner], [sampler]).k3 == pytest.approx(step**2 / 2, rel=1e-4, abs=0)


def test_estimators_approach_the_divergence() -> None:
    rng = np.random.default_rng(0)
    sampler, learner = rng.dirichlet(np.ones(5)), rng.dirichlet(np.ones(5))
    tokens = rng.choice(5, size=200_000, p=sampler)
    log_sampler, log_learner = (np.log(p).astype(np.float32)[tokens] for p in (sampler, learner))
    mismatch = Mismatch.between([log_learner], [log_sampler])
    divergence = float(np.sum(sampler * np.log(sampler / learner)))
    assert mismatch.k1 == pytest.approx(divergence, rel=0.02)
    assert mismatch.k3 == pytest.approx(divergence, rel=0.02)


def test_what_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match="different lengths"):
        Mismatch.between(split([-1.0, -2.0], 1, 1), split([-1.0, -2.0], 2))
    with pytest.raises(ValueError, match="no token"):
        Mismatch.between([], [])
    with pytest.raises(ValueError, match="no token"):
        Mismatch.between(split([], 0), split([], 0))


def test_names_of_metrics() -> None:
    """Dashboards and docs/mismatch.md know these names."""
    mismatch = Mismatch(1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, {0.001: 10.0, 2.0: 11.0})
    assert mismatch.metrics("m/") == {
        "m/logp_abs_mean": 1.0,
        "m/logp_abs_p99": 2.0,
        "m/logp_abs_max": 3.0,
        "m/k1_kl": 4.0,
        "m/k3_kl": 5.0,
        "m/seq_ratio_min": 6.0,
        "m/seq_ratio_mean": 7.0,
        "m/seq_ratio_max": 8.0,
        "m/ess": 9.0,
        "m/logp_abs_above_0.001": 10.0,
        "m/logp_abs_above_2": 11.0,
    }
    assert all(name.startswith("mismatch/") for name in mismatch.metrics())


# --- sequences -------------------------------------------------------------------------------------------------------


SEQUENCES = st.lists(arrays(np.float32, st.integers(0, 9), elements=st.floats(-20, 0, width=32)), min_size=1)


def with_noise(learner: list[np.ndarray], seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [(a + rng.normal(size=a.shape)).astype(np.float32) for a in learner]


@given(learner=SEQUENCES, seed=st.integers(0, 1000), bound=st.sampled_from([1e-3, 0.5, 1.0]))
def test_against_a_plain_computation(learner: list[np.ndarray], seed: int, bound: float) -> None:
    sampler = with_noise(learner, seed)
    d = [[float(x) - float(y) for x, y in zip(a, b, strict=True)] for a, b in zip(learner, sampler, strict=True)]
    tokens = [x for row in d for x in row]
    if not tokens:
        return
    mismatch = Mismatch.between(learner, sampler, [bound])
    ratios = [math.exp(math.fsum(row) / len(row)) for row in d if row]
    weights = [math.exp(math.fsum(row)) for row in d if row]
    assert mismatch.seq_ratio_min == pytest.approx(min(ratios))
    assert mismatch.seq_ratio_mean == pytest.approx(math.fsum(ratios) / len(ratios))
    assert mismatch.seq_ratio_max == pytest.approx(max(ratios))
    assert mismatch.ess == pytest.approx(
        math.fsum(weights) ** 2 / len(weights) / math.fsum(weight**2 for weight in weights)
    )
    assert 1 / len(weights) <= mismatch.ess * (1 + 1e-9)
    assert mismatch.ess <= 1 + 1e-9
    assert mismatch.above == {bound: pytest.approx(sum(abs(x) > bound for x in tokens) / len(tokens))}
    assert mismatch.abs_mean == pytest.approx(math.fsum(map(abs, tokens)) / len(tokens))
    assert mismatch.k1 == pytest.approx(-math.fsum(tokens) / len(tokens), abs=1e-12)
    assert mismatch.k3 == pytest.approx(math.fsum(math.exp(x) - 1 - x for x in tokens) / len(tokens), abs=1e-12)


def test_effective_sample_size_by_hand() -> None:
    """Plain weights 3 and 1: (3 + 1)^2 / (2 * (9 + 1)). Their length-normalised ratios are sqrt(3) and 1."""
    learner, sampler = split([math.log(3), 0.0, 0.0], 2, 1), split([0.0, 0.0, 0.0], 2, 1)
    mismatch = Mismatch.between(learner, sampler)
    assert mismatch.ess == pytest.approx(0.8)
    assert mismatch.seq_ratio_max == pytest.approx(math.sqrt(3))
    assert mismatch.seq_ratio_min == 1.0


def test_huge_weights_do_not_overflow() -> None:
    learner, sampler = [np.zeros(2000, np.float32)] * 2, [np.full(2000, -1, np.float32), np.zeros(2000, np.float32)]
    assert Mismatch.between(learner, sampler).ess == 0.5  # exp(2000) has everything


@given(sequences=SEQUENCES)
def test_quartiles_partition_the_tokens(sequences: list[np.ndarray]) -> None:
    parts = quartiles(sequences)
    assert len(parts) == 4
    for index, sequence in enumerate(sequences):
        runs = [part[index] for part in parts]
        assert np.array_equal(np.concatenate(runs), sequence)
        assert max(map(len, runs)) - min(map(len, runs)) <= 1


@given(learner=SEQUENCES, seed=st.integers(0, 1000))
def test_quartiles_add_up_to_the_whole(learner: list[np.ndarray], seed: int) -> None:
    sampler = with_noise(learner, seed)
    found = by_quartile(learner, sampler, [0.5])
    sizes = {number: sum(map(len, part)) for number, part in enumerate(quartiles(learner), 1)}
    assert set(found) == {number for number, size in sizes.items() if size}
    if found:
        whole = Mismatch.between(learner, sampler, [0.5])
        total = sum(sizes.values())
        assert max(part.abs_max for part in found.values()) == whole.abs_max
        for name in ("abs_mean", "k1", "k3"):
            parts = math.fsum(getattr(part, name) * sizes[number] for number, part in found.items())
            assert parts / total == pytest.approx(getattr(whole, name), abs=1e-12)
        assert sum(part.above[0.5] * sizes[n] for n, part in found.items()) / total == pytest.approx(whole.above[0.5])


def test_a_gap_that_grows_with_position_shows_in_its_quartile() -> None:
    learner = [np.zeros(8, np.float32), np.zeros(4, np.float32)]
    sampler = [np.repeat(np.float32([0, 0, 0, -1]), 2), np.float32([0, 0, 0, -1])]
    found = by_quartile(learner, sampler)
    assert [found[q].abs_mean for q in (1, 2, 3, 4)] == [0, 0, 0, 1]


def test_quartiles_of_unequal_lengths() -> None:
    with pytest.raises(ValueError, match="different lengths"):
        by_quartile([np.zeros(0, np.float32)], [np.zeros(1, np.float32)])

"""The detectors of error tokens against plain Python, and what is told of them."""

from __future__ import annotations

import math
import random
import string
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qarl.config.error_tokens import ErrorTokensConfig
from qarl.error_tokens import (
    ErrorTokens,
    compression_ratio,
    error_token_metrics,
    find_error_tokens,
    repeated_ngrams,
    runs,
    worst,
)

CONFIG = ErrorTokensConfig(ngram=2, ngram_count=3, compression_ratio=4.0, probability=0.1, probability_run=2)


def flags(text: str) -> np.ndarray:
    return np.array([c == "x" for c in text])


def test_columns_of_a_table_name_the_tokens() -> None:
    tokens = ErrorTokens(flags("xx..x."), flags("......"), flags("...xxx"))
    assert tokens.columns() == {"error_share": 5 / 6, "error_tokens": "repeated 0-1 4-4 improbable 3-5"}
    assert found("..")[0].columns() == {"error_share": 0.0, "error_tokens": ""}


def found(*rows: str) -> list[ErrorTokens]:
    """Responses whose flagged tokens are the `x`, all by the first detector."""
    return [ErrorTokens(flags(row), flags(row) & False, flags(row) & False) for row in rows]


@pytest.mark.parametrize(
    ("ids", "n", "count", "expected"),
    [
        ("abcabcabcd", 3, 3, "xxxxxxxxx."),
        ("abcabcabcd", 3, 4, ".........."),
        ("zaaaay", 2, 3, ".xxxx."),  # occurrences overlap: aa at 1, 2 and 3
        ("abab", 1, 2, "xxxx"),
        ("abcd", 5, 2, "...."),
        ("", 2, 2, ""),
    ],
)
def test_repetition_by_hand(ids: str, n: int, count: int, expected: str) -> None:
    codes = np.array([ord(c) for c in ids], np.int64)
    assert repeated_ngrams(codes, n, count).tolist() == flags(expected).tolist()


@given(st.lists(st.integers(0, 2), max_size=30), st.integers(1, 4), st.integers(2, 4))
def test_repetition_is_counting_every_window(ids: list[int], n: int, count: int) -> None:
    windows = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    expected = [
        any(windows.count(windows[s]) >= count for s in range(max(0, t - n + 1), min(t + 1, len(windows))))
        for t in range(len(ids))
    ]
    assert repeated_ngrams(np.array(ids, np.int64), n, count).tolist() == expected


@given(st.lists(st.booleans(), max_size=30), st.integers(1, 5))
def test_runs_are_as_long_as_asked(given_flags: list[bool], least: int) -> None:
    expected = [False] * len(given_flags)
    start = 0
    while start < len(given_flags):
        end = start
        while end < len(given_flags) and given_flags[end]:
            end += 1
        if end - start >= least:
            expected[start:end] = [True] * (end - start)
        start = max(end, start + 1)
    assert runs(np.array(given_flags, bool), least).tolist() == expected


def test_compression_tells_loops_from_text() -> None:
    noise = "".join(random.Random(0).choices(string.ascii_letters, k=2000))
    assert compression_ratio("wait, " * 300) > 50
    assert compression_ratio(noise) < 1.5
    assert compression_ratio("ab") == 2 / len(zlib.compress(b"ab"))
    assert compression_ratio("") == 0


def test_each_detector_flags_its_own() -> None:
    logp_T = np.log(np.array([0.5, 0.05, 0.05, 0.5, 0.05, math.nan], np.float32))
    tokens = find_error_tokens((7, 8, 7, 8, 7, 8), "short", logp_T, CONFIG)
    assert tokens.repeated_T.tolist() == flags("xxxxxx").tolist()
    assert tokens.improbable_T.tolist() == flags(".xx...").tolist()  # the second run is too short, NaN is no evidence
    assert not tokens.compressible_T.any()
    assert tokens.share == 1
    garbled = find_error_tokens((1, 2, 3), "la" * 200, np.zeros(3, np.float32), CONFIG)
    assert garbled.compressible_T.all()
    assert not garbled.repeated_T.any()


def test_shares_by_hand() -> None:
    metrics = error_token_metrics(found("....xxxx", "..xx", "x"), [1.0, -2.0, 0.0])
    assert metrics == pytest.approx(
        {
            "error_tokens/share": 7 / 13,
            "error_tokens/repeated": 7 / 13,
            "error_tokens/compressible": 0.0,
            "error_tokens/improbable": 0.0,
            "error_tokens/q1": 0.0,
            "error_tokens/q2": 0.0,
            "error_tokens/q3": 1.0,
            "error_tokens/q4": 1.0,  # the response of one token is a fourth quarter
            "error_tokens/positive": 0.5,
            "error_tokens/negative": 0.5,
            "error_tokens/zero": 1.0,
            "error_tokens/responses": 1.0,
        }
    )
    assert error_token_metrics([], []) == {}
    assert "error_tokens/negative" not in error_token_metrics(found("x."), [1.0])


def test_an_empty_response_holds_no_error_tokens() -> None:
    empty = find_error_tokens((), "", np.zeros(0, np.float32), CONFIG)
    assert empty.share == 0
    assert worst([empty, *found("..xx")], 8) == [1]


def test_the_worst_come_first_and_the_clean_never() -> None:
    assert worst(found("x...", "....", "xx", "xx.."), 8) == [2, 3, 0]
    assert worst(found("x...", "....", "xx", "xx.."), 2) == [2, 3]

"""Kinds of numbers on the command line."""

from __future__ import annotations


def positive_int(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


def multiple_of_128(text: str) -> int:
    number = positive_int(text)
    if number % 128:
        raise ValueError(text)
    return number

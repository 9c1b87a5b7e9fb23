"""Mathematical answers, compared by Math-Verify (https://github.com/huggingface/Math-Verify)."""

import logging
from functools import lru_cache
from typing import Any

import math_verify

# It warns in every process that its own time-outs are off. They need SIGALRM, and the service limits the time anyway.
logging.getLogger("math_verify").setLevel(logging.ERROR)


def verify(text: str, finish_reason: str, answer: str) -> float:
    """1.0 when the last answer in `text` is mathematically equal to `answer`, else 0.0.

    `answer` is plain ("72") or LaTeX, with or without delimiters. A completion that Math-Verify cannot read or compare
    is wrong. `finish_reason` is ignored: the last answer counts even when the response was cut after it. Words are read
    as products of letters, and bases are dropped (52_8 is 52): use data whose answers are numbers, sets or formulas.
    Some expressions, such as a tower of powers, take forever: the caller must limit the time.
    Raises ValueError: Math-Verify finds nothing in `answer`.
    """
    reference = _reference(answer)
    if text.strip() == answer.strip():
        return 1.0
    return float(math_verify.verify(reference, _parse(_final(text)), timeout_seconds=None))


@lru_cache(maxsize=1024)
def _reference(answer: str) -> list[Any]:
    # Bare LaTeX is only found between delimiters.
    if parsed := _parse(f"${_final(answer).strip()}$"):
        return parsed
    raise ValueError(f"Math-Verify cannot read the reference answer {answer!r}")


def _final(text: str) -> str:
    """What follows `####`, the mark of GSM8K, on the last line; `text` itself without the mark."""
    last_line = text.rstrip().rpartition("\n")[2]
    return last_line[4:] if last_line.startswith("####") else text


def _parse(text: str) -> list[Any]:
    return math_verify.parse(text, parsing_timeout=None)

"""The whole completion, character by character."""

from collections.abc import Sequence

from rewards.component import Response


def exact(response: Response) -> float:
    """1.0 when the whole completion equals a right answer and ended itself; else 0.0."""
    return is_exact(response.text, response.finish_reason, response.answers)


def is_exact(text: str, finish_reason: str, answers: Sequence[str]) -> float:
    """The same of what a response consists of."""
    return float(finish_reason == "stop" and text in answers)

"""The exact verifier."""


def verify(text: str, finish_reason: str, answer: str) -> float:
    """1.0 when the whole completion equals `answer`, character by character, and ended itself; else 0.0."""
    return float(finish_reason == "stop" and text == answer)

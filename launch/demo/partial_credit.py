"""A reward for long answers of which hardly one is right from end to end: credit for how it begins."""


def right_beginning(text: str, finish_reason: str, answer: str) -> float:
    """Share of the answer's characters before the first wrong one; 1.0 only for the whole answer that ended itself."""
    if text == answer and finish_reason == "stop":
        return 1.0
    pairs = zip(text, answer, strict=False)
    right = next((i for i, (found, wanted) in enumerate(pairs) if found != wanted), min(len(text), len(answer)))
    return right / (len(answer) + 1)

"""The number of response tokens."""

from rewards.component import Response


def length(response: Response, shortest: int, longest: int | None) -> float:
    """1.0 when the number of tokens lies within the bounds; else 0.0."""
    count = len(response.token_ids)
    return float(shortest <= count and (longest is None or count <= longest))


def overlong(response: Response, limit: int, cache: int) -> float:
    """DAPO's soft overlong punishment (arXiv 2503.14476, equation 13): 0 up to `limit - cache` tokens, then falling
    linearly to -1 at `limit`."""
    excess = len(response.token_ids) - (limit - cache)
    return -min(max(excess, 0) / cache, 1.0)

"""Repeated n-grams of tokens."""

from rewards.component import Response


def repetition(response: Response, n: int) -> float:
    """Minus the share of the response's n-grams that occurred before in it, in [-1, 0]; 0 for fewer than `n` tokens."""
    ids = response.token_ids
    grams = [ids[i : i + n] for i in range(len(ids) - n + 1)]
    return len(set(grams)) / len(grams) - 1.0 if grams else 0.0

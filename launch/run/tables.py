"""Rows of the tables of responses, as trackers get them."""

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

from qarl.protocols import Row

MAX_TOKENS = 2048
"""Tokens of a response whose values a table keeps."""
Decode = Callable[[Sequence[int]], str]
"""Makes the text of token ids."""


def with_tokens(row: Row, decode: Decode | None) -> Row:
    """The row with the texts of its tokens (`tokens`) in place of their ids, and in `marked` the response with its
    error tokens in brackets, where it has any. Lists are cut to `MAX_TOKENS`."""
    cut: dict[str, Any] = {k: v if isinstance(v, str | float | int) else list(v)[:MAX_TOKENS] for k, v in row.items()}
    ids = cut.pop("token_ids", None)
    if decode is None or ids is None:
        return cut
    texts = [decode([token]) for token in ids]
    flags = cut.get("token_errors", [])
    return {**cut, "marked": _marked(texts, flags) if any(flags) else "", "tokens": texts}


def _marked(texts: Sequence[str], flags: Sequence[int]) -> str:
    runs = groupby(zip(texts, flags, strict=True), key=lambda pair: bool(pair[1]))
    joined = [(is_error, "".join(text for text, _ in run)) for is_error, run in runs]
    return "".join(f"⟦{text}⟧" if is_error else text for is_error, text in joined)

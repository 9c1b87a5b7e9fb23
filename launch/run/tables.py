"""Rows of the tables of responses, as trackers get them."""

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any

from qarl.protocols import Row

MAX_TOKENS = 2048
"""Tokens of a response whose values a table keeps."""
MAX_BYTES = 4
"""Of a character, and so tokens."""
Decode = Callable[[Sequence[int]], str]
"""Makes the text of token ids."""


def with_tokens(row: Row, decode: Decode | None) -> Row:
    """The row with the texts of its tokens (`tokens`) in place of their ids, and in `marked` the response with its
    error tokens in brackets, where it has any.

    Lists are cut to `MAX_TOKENS`; `tokens` then has the text of all the others as one more.
    """
    cut: dict[str, Any] = {k: v if isinstance(v, str | float | int) else list(v)[:MAX_TOKENS] for k, v in row.items()}
    cut.pop("token_ids", None)
    whole: Mapping[str, Any] = row
    ids, flags = whole.get("token_ids"), whole.get("token_errors", [])
    if decode is None or ids is None:
        return cut
    texts = texts_of(ids, decode)
    rest = ["".join(texts[MAX_TOKENS:])] if len(texts) > MAX_TOKENS else []
    return {**cut, "marked": _marked(texts, flags) if any(flags) else "", "tokens": texts[:MAX_TOKENS] + rest}


def texts_of(ids: Sequence[int], decode: Decode) -> list[str]:
    """What each token adds to the text: joined, they are the text of all. A character of several tokens belongs to
    the last of them."""
    texts: list[str] = []
    context = begun = 0  # the tokens before `begun` have their texts; those from `context` on are decoded with the next
    for end in range(1, len(ids) + 1):
        newest = decode(ids[max(begun, end - MAX_BYTES) : end])
        if newest.endswith("\ufffd") and end < len(ids):
            texts.append("")
            continue
        texts.append(decode(ids[context:end]).removeprefix(decode(ids[context:begun])))
        context, begun = begun, end
    return texts


def _marked(texts: Sequence[str], flags: Sequence[int]) -> str:
    runs = groupby(zip(texts, flags, strict=True), key=lambda pair: bool(pair[1]))
    joined = [(is_error, "".join(text for text, _ in run)) for is_error, run in runs]
    return "".join(f"⟦{text}⟧" if is_error else text for is_error, text in joined)

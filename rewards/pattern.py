"""The form of a response: regular expressions and tags."""

import re
from collections.abc import Sequence
from functools import lru_cache

from rewards.component import Response


def matches(response: Response, pattern: str, whole: bool) -> float:
    """1.0 when `pattern` matches a part of the response, or all of it."""
    search = re.fullmatch if whole else re.search
    return float(search(pattern, response.text, re.DOTALL) is not None)


def has_format(response: Response, tags: Sequence[str], opened: bool, rest: bool) -> float:
    """1.0 when the response is `<a>...</a><b>...</b>` for `tags` a and b; see the settings of the kind `format`."""
    text = f"<{tags[0]}>{response.text}" if opened else response.text
    once = all(text.count(f"<{tag}>") == text.count(f"</{tag}>") == 1 for tag in tags)
    return float(once and _form(tuple(tags), rest).fullmatch(text) is not None)


@lru_cache
def _form(tags: tuple[str, ...], rest: bool) -> re.Pattern[str]:
    parts = r"\s*".join(f"<{tag}>.*</{tag}>" for tag in map(re.escape, tags))
    end = ".*" if rest else r"\s*"
    return re.compile(rf"\s*{parts}{end}", re.DOTALL)

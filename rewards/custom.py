"""A function of the user's own: plain or async, for a response, a group or a batch."""

import asyncio
import inspect
from collections.abc import Awaitable, Mapping, Sequence
from typing import Any

from qarl.hooks import Hook, check_call, load_function
from rewards.component import Component, Response

FIELDS = ("prompt", "token_ids", "answers", "source", "metadata", "row")
"""What a function of one response gets by name when it has a parameter of that name."""


def check_function(name: str, where: str, kwargs: Mapping[str, Any], scope: str) -> None:
    """Raises ConfigError that names the key `where`: the function cannot be loaded, or not be called as below."""
    function = load_function(name, where)
    if scope == "sample":
        fields = dict.fromkeys(_fields(function, kwargs))
        check_call(function, ("text", "finish_reason", "answer"), {**fields, **kwargs}, where)
    else:
        check_call(function, ("responses",), kwargs, where)


def _fields(function: Hook, kwargs: Mapping[str, Any]) -> list[str]:
    try:
        named = inspect.signature(function).parameters
    except ValueError:  # a builtin without a signature
        return []
    return [name for name in FIELDS if name in named and name not in kwargs]


class Custom(Component):
    """`scope: sample` calls `function(text, finish_reason, answer, **kwargs)`, with the fields above that it names and
    what the row has for its verifier; `group` and `batch` call `function(responses, **kwargs)`, which returns one
    reward a response."""

    def __init__(self, function: str, kwargs: Mapping[str, Any], scope: str, at_once: int) -> None:
        self._function, self._kwargs, self._scope = load_function(function, "reward"), kwargs, scope
        self._fields = _fields(self._function, kwargs)

    def judge(self, responses: Sequence[Response]) -> Sequence[float]:
        if self._scope != "sample":
            return _now(self._function(list(responses), **self._kwargs))
        return _now([self._one(response) for response in responses])

    def _one(self, response: Response) -> Any:
        named = {name: getattr(response, name) for name in self._fields} | {**self._kwargs, **response.row}
        return self._function(response.text, response.finish_reason, response.answer, **named)


def _now(result: Any) -> Any:
    """`result`, or what it or its items give when they are awaited, all at once."""
    if inspect.isawaitable(result):
        return asyncio.run(_all([result]))[0]
    if any(map(inspect.isawaitable, result)):
        return asyncio.run(_all(result))
    return result


async def _all(calls: Sequence[Awaitable[Any]]) -> list[Any]:
    return list(await asyncio.gather(*calls, return_exceptions=len(calls) > 1))

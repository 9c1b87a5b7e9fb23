"""An environment of the package `verifiers`, unmodified. It runs where that package is: see `environment.python`.

Written for versions 0.2 and 0.3; 0.4 has the API v1 alone. verifiers' own rollout loop runs here and asks a client for
the model's responses; this client waits for the policy's. As a program it writes the rows of an environment, for
`task.kind: dataset`:

    python from_verifiers.py NAME SETTINGS TRAIN.jsonl HELDOUT.jsonl
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any

import verifiers

if not hasattr(verifiers, "load_environment"):
    raise ImportError(
        f"verifiers {verifiers.__version__} has the API v1 alone, where an environment is a program that asks a server "
        "for responses; install verifiers<0.4, and an environment for it"
    )

from verifiers.clients import Client
from verifiers.types import Response, ResponseMessage, ToolCall

TOOL_CALL = re.compile(r"<tool_call>\s*(\{.*?\})\s*</tool_call>", re.DOTALL)
"""How the chat templates of Hermes and Qwen write the call of a tool."""


class Verifiers:
    """One rollout of the environment `name`, loaded with `settings`, on the row in `prompt["metadata"]["example"]`."""

    def __init__(self, name: str, **settings: Any) -> None:
        self._environment = _load(name, json.dumps(settings, sort_keys=True))

    def reset(self, prompt: dict[str, Any]) -> dict[str, Any]:
        """The first messages, and the tools that the environment offers."""
        self._client = PolicyClient()
        rollout = self._environment.run_rollout(prompt["metadata"]["example"], self._client, "policy", {})
        self._rollout = _loop().create_task(rollout)
        return {"messages": self._next(), "tools": self._client.tools}

    def step(self, response: str) -> tuple[Any, float, bool]:
        self._client.responses.put_nowait(response)
        given = self._next()
        if not self._rollout.done():
            return given, 0.0, False
        output = self._rollout.result()
        if output.get("error"):
            raise RuntimeError(f"verifiers: {output['error']}")
        return None, float(output["reward"]), True

    def close(self) -> None:
        self._rollout.cancel()

    def _next(self) -> list[dict[str, Any]]:
        """Let the rollout go on until it asks for a response, with messages that the policy has not seen, or ends."""
        asked = _loop().create_task(self._client.requests.get())
        _loop().run_until_complete(asyncio.wait([asked, self._rollout], return_when=asyncio.FIRST_COMPLETED))
        if asked.done():
            return asked.result()
        asked.cancel()
        return []


class PolicyClient(Client):
    """Hands messages out and waits for the responses to them."""

    def __init__(self) -> None:
        super().__init__(None)
        self.requests: asyncio.Queue[list[dict[str, Any]]] = asyncio.Queue()
        self.responses: asyncio.Queue[str] = asyncio.Queue()
        self.tools: list[dict[str, Any]] = []
        self._seen = 0

    async def get_response(
        self, prompt: Any, model: str, sampling_args: Any, tools: Any = None, **kwargs: Any
    ) -> Response:
        self.tools = [{"type": "function", "function": _plain(tool)} for tool in tools or ()]
        messages = [_plain(message) for message in prompt]
        self.requests.put_nowait(messages[self._seen :])
        text = await self.responses.get()
        self._seen = len(messages) + 1  # the response itself needs no telling
        calls = [_tool_call(number, found) for number, found in enumerate(TOOL_CALL.findall(text))] if tools else []
        message = ResponseMessage(
            content=text, tool_calls=calls or None, finish_reason="tool_calls" if calls else "stop", is_truncated=False
        )
        return Response(id="policy", created=0, model=model, message=message)

    def setup_client(self, config: Any) -> Any:
        return None

    async def to_native_tool(self, tool: Any) -> Any:
        return tool

    async def to_native_prompt(self, messages: Any) -> tuple[Any, dict[str, Any]]:
        return messages, {}

    async def get_native_response(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("get_response needs none")

    async def raise_from_native_response(self, response: Any) -> None:
        return None

    async def from_native_response(self, response: Any) -> Any:
        return response

    async def close(self) -> None:
        return None


@cache
def _load(name: str, settings: str) -> Any:
    return verifiers.load_environment(name, **json.loads(settings))


@cache
def _loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    return loop


def _plain(value: Any) -> dict[str, Any]:
    return dict(value) if isinstance(value, dict) else value.model_dump(exclude_none=True)


def _tool_call(number: int, text: str) -> ToolCall:
    """A call that is no JSON is handed on as it is: the environment says what is wrong with it."""
    try:
        call = json.loads(text)
        return ToolCall(id=str(number), name=str(call["name"]), arguments=json.dumps(call.get("arguments", {})))
    except (ValueError, KeyError, TypeError, AttributeError):
        return ToolCall(id=str(number), name="", arguments=text)


def write_rows(name: str, settings: str, train: str, heldout: str) -> None:
    """Write the environment's rows: a text of the prompt, its answer, and the whole row as `example`."""
    environment = _load(name, settings)
    for file, rows in ((train, environment.get_dataset()), (heldout, environment.get_eval_dataset())):
        with Path(file).open("w") as opened:
            for row in rows:
                question = "\n".join(str(_plain(message).get("content", "")) for message in row["prompt"])
                line = {"question": question, "answer": str(row.get("answer") or "none"), "example": row}
                opened.write(json.dumps(line, default=str) + "\n")


if __name__ == "__main__":
    sys.path.append(os.getcwd())  # where an environment may lie that is not installed
    write_rows(*sys.argv[1:])

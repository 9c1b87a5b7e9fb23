"""Token ids of what an environment gives. What the policy sampled is never made into tokens again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qarl.config.task import TaskConfig
from qarl.errors import DataError
from qarl.model_folder import reading
from qarl.tasks.task import special_tokens
from qarl.types import EnvironmentTurn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ANSWER = "the-answer-of-the-policy"
"""Stands for the policy's turn while the chat template renders what comes after it."""


class TurnEncoder:
    """Makes token ids of a given text or messages: with `task.chat` by the chat template, else as they are."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: TaskConfig) -> None:
        self._tokenizer, self._config = tokenizer, config
        self._special = special_tokens(tokenizer)

    def prompt(self, turn: EnvironmentTurn) -> tuple[int, ...]:
        """Ids of a prompt that the environment gave. Raises DataError as `following` does."""
        tools = turn.given.get("tools") if isinstance(turn.given, Mapping) else None
        messages = turn.given.get("messages") if isinstance(turn.given, Mapping) else turn.given
        if (ids := _ids(messages)) is not None:
            return ids
        if not self._config.chat:
            return tuple(self._tokenizer.encode(self._text(messages)))
        messages, system = self._messages(messages), self._config.system_prompt
        if system is not None and (not messages or messages[0].get("role") != "system"):
            messages = [{"role": "system", "content": system}, *messages]
        text = self._render(messages, tools)
        return tuple(self._tokenizer.encode(text, add_special_tokens=False))

    def following(self, turn: EnvironmentTurn, last: int) -> tuple[int, ...]:
        """Ids of what the environment gave after a response whose last token is `last`, up to the policy's next token.

        Raises DataError: it is neither text, messages nor ids, holds a special token, or has no token.
        """
        if (ids := _ids(turn.given)) is None:
            text = self._text(turn.given)
            if self._config.chat:
                before = [{"role": "user", "content": "-"}, {"role": "assistant", "content": ANSWER}]
                whole = self._render([*before, *self._messages(turn.given)])
                # The response has the end token already.
                text = whole.rpartition(ANSWER)[2].removeprefix(self._tokenizer.decode([last]))
            ids = tuple(self._tokenizer.encode(text, add_special_tokens=False))
        if not ids:
            raise DataError("gave nothing, and is not done")
        return ids

    def text(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(ids))

    def _render(self, messages: list[Mapping[str, Any]], tools: Any = None) -> str:
        kwargs = {**self._config.chat_template_kwargs, "add_generation_prompt": True, "tokenize": False}
        with reading(Path(self._tokenizer.name_or_path), "chat template"):  # a template may raise anything
            return str(self._tokenizer.apply_chat_template(messages, tools=tools or None, **kwargs))

    def _messages(self, given: Any) -> list[Mapping[str, Any]]:
        messages = [{"role": "user", "content": given}] if isinstance(given, str) else given
        self._text(messages)
        return list(messages)

    def _text(self, given: Any) -> str:
        """All text of what was given; checks it."""
        parts = given if isinstance(given, list) else [given]
        texts = [part.get("content") if isinstance(part, Mapping) else part for part in parts]
        if wrong := [text for text in texts if not isinstance(text, str)]:
            raise DataError(f"gave a {type(wrong[0]).__name__}, not a text, messages with content, or token ids")
        text = "".join(map(str, texts))
        if found := self._special.search(text):
            raise DataError(f"gave the special token '{found[0]}', which would end or begin turns")
        return text


def _ids(given: Any) -> tuple[int, ...] | None:
    """Token ids that were given as such."""
    is_ids = isinstance(given, list) and given and all(type(token) is int for token in given)
    return tuple(given) if is_ids else None

"""Responses to be judged."""

from __future__ import annotations

from typing import Any

from rewards.component import Response


def response(text: str, *answers: str, prompt_id: str = "p", finish_reason: str = "stop", **fields: Any) -> Response:
    ids = fields.pop("token_ids", (1, 2))
    return Response(prompt_id, f"the prompt of {prompt_id}", text, ids, finish_reason, answers or ("",), **fields)


def share_of_digits(text: str, finish_reason: str, answer: str) -> float:
    """A reward that differs between the responses of a random model."""
    return sum(character.isdigit() for character in text) / max(1, len(text))

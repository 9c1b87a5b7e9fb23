"""The table of kinds: which function or class of which file judges."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from qarl.errors import ConfigError
from rewards.component import Component, Rule

if TYPE_CHECKING:
    from qarl.config.reward import ComponentConfig

KINDS = {
    "exact": "rewards.exact:exact",
    "math": "rewards.math:Math",
    "choice": "rewards.choice:choice",
    "numeric": "rewards.numeric:Numeric",
    "regex": "rewards.pattern:matches",
    "format": "rewards.pattern:has_format",
    "length": "rewards.length:length",
    "overlong": "rewards.length:overlong",
    "repetition": "rewards.repetition:repetition",
    "code": "rewards.code:Code",
    "judge": "rewards.judge:Judge",
    "http": "rewards.http:Http",
    "reasoning_gym": "rewards.reasoning_gym:reasoning_gym",
    "custom": "rewards.custom:Custom",
}


def check_component(part: ComponentConfig) -> None:
    """Raises ConfigError: a package or a file that the component needs is not on this machine, or its key is not set.
    The user's own functions are checked with the other hooks."""
    where = f"reward.components '{part.label}'"
    if part.kind == "custom":
        return
    try:
        make(part.kind, part.full_settings().model_dump())
    except ConfigError:
        raise
    except (ImportError, OSError, ValueError) as error:
        raise ConfigError(f"{part.kind} cannot work here: {type(error).__name__}: {error}", where) from error


def make(kind: str, settings: Mapping[str, Any]) -> Component:
    """The component of that kind. Raises what its file or constructor raises: it cannot work here."""
    module, _, name = KINDS[kind].partition(":")
    judge = getattr(importlib.import_module(module), name)
    return judge(**settings) if isinstance(judge, type) else Rule(judge, settings)


def answer_reader(kind: str, settings: Mapping[str, Any]) -> Callable[[str], str] | None:
    """A function that finds the answer in a response, as that kind does; "" for none. None for kinds that find none."""
    if kind == "exact":
        return str
    if kind in ("math", "numeric"):
        from rewards.math import candidates

        return lambda text: "".join(next(candidates(text), "").split())
    if kind == "choice":
        from qarl.config.reward import ChoiceSettings
        from rewards.choice import chosen

        letters = ChoiceSettings(**settings).letters
        return lambda text: chosen(text, letters) or ""
    return None

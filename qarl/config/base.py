"""What every section of the configuration is made of. Free of torch."""

import os
import re
from collections.abc import Iterator
from math import inf
from typing import Annotated, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Share = Annotated[float, Field(gt=0.0, le=1.0)]
LARGEST = 2**31 - 1
"""What engines and Ray can hold in any of their counts."""
PositiveInt = Annotated[int, Field(ge=1, le=LARGEST)]
Count = Annotated[int, Field(ge=0, le=LARGEST)]
AutoCount = Annotated[int, Field(ge=0, le=LARGEST), BeforeValidator(lambda value: 0 if value == "auto" else value)]
"""A count, or "auto", which is held as 0 until `qarl.config.derived.choose_counts` chooses it."""
PositiveFloat = Annotated[float, Field(gt=0.0)]
NonNegativeFloat = Annotated[float, Field(ge=0.0)]
Seconds = Annotated[float, Field(gt=0.0, le=1e8)]
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_.-]*$"
NAME_TEXT = "a name has letters, digits, dots, dashes and underscores, and begins with a letter or digit"
Betas = Annotated[list[Annotated[float, Field(ge=0.0, lt=1.0)]], Field(min_length=2, max_length=2)]


def _whole_above_one(cpus: float) -> float:
    if cpus > 1 and cpus != int(cpus):
        raise ValueError("more than one CPU can be reserved in whole numbers only")
    return cpus


CPUs = Annotated[float, Field(ge=1e-4, le=LARGEST), AfterValidator(_whole_above_one)]
"""CPUs that Ray reserves for an actor, as Ray counts them."""


def usable_path(text: str) -> str:
    """`text` with `~` replaced. Raises ValueError: it is none, longer than file systems take, or not Unicode."""
    path = os.path.expanduser(text)
    if not text or "\0" in text:
        raise ValueError("must be a path")
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ValueError("is not Unicode")
    parts = path.encode().split(b"/")
    if max(map(len, parts)) > 255 or len(b"/".join(parts)) > 4000:
        raise ValueError("is longer than file systems take (names of 255 bytes, paths of 4,000)")
    return path


PathText = Annotated[str, AfterValidator(usable_path)]
"""A file or folder; `~` is the home folder."""
PathOrEmpty = Annotated[str, AfterValidator(lambda text: usable_path(text) if text else text)]


def _url(text: str) -> str:
    try:
        has_host = bool(urlsplit(text).hostname and urlsplit(text).port != 0)
    except ValueError:  # a port that is none
        has_host = False
    if not has_host:
        raise ValueError("has no host and port that there may be")
    return text


def _regex(least: float, most: float, groups: str) -> AfterValidator:
    def check(pattern: str) -> str:
        try:
            found = re.compile(pattern).groups
        except re.error as error:
            reason = str(error).replace(": ", ", ")
            raise ValueError(f"must be a regular expression ({reason})") from error
        if not least <= found <= most:
            raise ValueError(f"must be a regular expression with {groups} group ((?:...) makes none)")
        return pattern

    return AfterValidator(check)


Regex = Annotated[str, _regex(0, inf, "any")]
OneGroup = Annotated[str, _regex(1, 1, "one")]
AtMostOneGroup = Annotated[str, _regex(0, 1, "at most one")]
Url = Annotated[str, Field(pattern=r"^https?://[!-~]+$"), AfterValidator(_url)]


class Node(BaseModel):
    """Base of every section: no unknown keys, no silent conversion from other types, field docs kept."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    def contradictions(self) -> Iterator[str]:
        """What is wrong between keys that are each valid: a line for each fault, the key first."""
        yield from ()

    @model_validator(mode="after")
    def _keys_agree(self) -> Self:
        if found := list(self.contradictions()):
            raise ValueError("; ".join(found))
        return self

"""What every section of the configuration is made of. Free of torch."""

import os
from collections.abc import Iterator
from typing import Annotated, Self

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
Betas = Annotated[list[Annotated[float, Field(ge=0.0, lt=1.0)]], Field(min_length=2, max_length=2)]


def _whole_above_one(cpus: float) -> float:
    if cpus > 1 and cpus != int(cpus):
        raise ValueError("more than one CPU can be reserved in whole numbers only")
    return cpus


CPUs = Annotated[float, Field(ge=1e-4, le=LARGEST), AfterValidator(_whole_above_one)]
"""CPUs that Ray reserves for an actor, as Ray counts them."""


def _path(text: str) -> str:
    path = os.path.expanduser(text)
    if not text or "\0" in text:
        raise ValueError("must be a path")
    parts = path.encode(errors="surrogatepass").split(b"/")
    if max(map(len, parts)) > 255 or len(b"/".join(parts)) > 4000:
        raise ValueError("is longer than file systems take (names of 255 bytes, paths of 4,000)")
    return path


PathText = Annotated[str, AfterValidator(_path)]
"""A file or folder; `~` is the home folder."""


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

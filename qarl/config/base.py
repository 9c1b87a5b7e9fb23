"""What every section of the configuration is made of. Free of torch."""

from collections.abc import Iterator
from typing import Annotated, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
PositiveInt = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
AutoCount = Annotated[int, Field(ge=0), BeforeValidator(lambda value: 0 if value == "auto" else value)]
"""A count, or "auto", which is held as 0 until `qarl.config.derived.choose_counts` chooses it."""
PositiveFloat = Annotated[float, Field(gt=0.0)]
NonNegativeFloat = Annotated[float, Field(ge=0.0)]
Betas = Annotated[list[Fraction], Field(min_length=2, max_length=2)]


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

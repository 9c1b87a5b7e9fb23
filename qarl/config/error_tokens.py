"""Keys of the detection of error tokens."""

from typing import Annotated, Literal

from pydantic import Field

from qarl.config.base import Count, Fraction, Node, PositiveFloat, PositiveInt


class ErrorTokensConfig(Node):
    mode: Literal["off", "measure", "mask"] = "measure"
    """`measure`: log the shares of error tokens. `mask`: also leave these tokens out of the loss."""
    ngram: PositiveInt = 8
    """Repetition: tokens of an n-gram of so many tokens ..."""
    ngram_count: Annotated[int, Field(ge=2)] = 4
    """... that occurs at least so often in its response."""
    compression_ratio: PositiveFloat = 10.0
    """All tokens of a response whose text zlib shrinks by more than this factor."""
    probability: Fraction = 0.01
    """Tokens that the learner gives less than this probability ..."""
    probability_run: PositiveInt = 3
    """... at least so many in a row."""
    table_every: Count = 18
    """Steps between tables of the worst responses; 0 for none."""
    table_rows: PositiveInt = 8
    """Responses in such a table."""

"""Keys of the detection of error tokens."""

from typing import Annotated, Literal

from pydantic import Field

from qarl.config.base import Count, Fraction, Node, PositiveFloat, PositiveInt


class ErrorTokensConfig(Node):
    mode: Literal["off", "measure", "mask"] = "measure"
    """`measure`: log which fraction of the tokens are error tokens. `mask`: also leave these tokens out of the loss."""
    ngram: PositiveInt = 8
    """Length, in tokens, of the n-grams that are searched for repetition."""
    ngram_count: Annotated[int, Field(ge=2)] = 4
    """An n-gram that occurs this many times or more in its response is repetition: its tokens are error tokens."""
    compression_ratio: PositiveFloat = 10.0
    """A response whose text zlib shrinks by more than this factor is repetition as a whole: all its tokens are error
    tokens."""
    probability: Fraction = 0.01
    """A token to which the learner gives less than this probability is unlikely."""
    probability_run: PositiveInt = 3
    """This many unlikely tokens in a row, or more, are garbled text: they are error tokens."""
    table_every: Count = 18
    """Steps between tables of the worst responses; 0 for none."""
    table_rows: PositiveInt = 8
    """Responses in such a table."""

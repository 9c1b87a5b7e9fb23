"""What `qarl mismatch` measures, as it lies in mismatch.json: gaps by the part that they come from."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from pydantic import ConfigDict, TypeAdapter, ValidationError

from qarl.errors import DataError
from qarl.mismatch import Logprobs, Mismatch, by_quartile

GAPS_FILE = "mismatch.json"
TOKEN_BOUNDS = (0.001, 0.01, 0.1)

Part = Literal["learner", "engine", "format", "rounding", "staleness"]


@dataclass(frozen=True)
class Gap:
    """How far two computations of the same tokens lie apart; they differ in one thing, `name`.

    `metrics` has the names of a run's `mismatch/...` metrics, without the prefix.
    """

    part: Part
    name: str
    metrics: dict[str, float]

    @classmethod
    def between(cls, part: Part, name: str, ours: Sequence[Logprobs], theirs: Sequence[Logprobs]) -> Self:
        metrics = Mismatch.between(ours, theirs, TOKEN_BOUNDS).metrics("")
        for number, quarter in by_quartile(ours, theirs, TOKEN_BOUNDS).items():
            metrics |= quarter.metrics(f"q{number}_")
        return cls(part, name, metrics)

    @property
    def mean(self) -> float:
        return self.metrics["logp_abs_mean"]

    @property
    def max(self) -> float:
        return self.metrics["logp_abs_max"]


@dataclass(frozen=True)
class Cell:
    """All gaps of one scheme, dtype and response length."""

    __pydantic_config__ = ConfigDict(ser_json_inf_nan="strings")

    model: str
    scheme: str
    dtype: str
    kernels: list[str]
    length: int
    sequences: int
    mean_logprob: float
    """Of the sampled tokens, in nats: how sure the model is of what it writes."""
    gaps: list[Gap]
    steps: int = 0
    """Training steps of the run whose final model this is; 0 for a model that is of no run."""

    @property
    def title(self) -> str:
        return f"{self.scheme} {self.dtype} {self.length}"


def write_gaps(file: Path, cells: Sequence[Cell]) -> None:
    file.write_bytes(TypeAdapter(list[Cell]).dump_json(list(cells), indent=2))


def read_gaps(file: Path) -> list[Cell]:
    """What the file holds; nothing where there is none. Raises DataError: it holds something else."""
    if not file.is_file():
        return []
    try:
        return TypeAdapter(list[Cell]).validate_json(file.read_bytes())
    except ValidationError as error:
        raise DataError("not what `qarl mismatch` writes", str(file), "delete it, or measure again") from error

"""The pool's state as plain values, and back with every check."""

from __future__ import annotations

import base64
import math
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from random import Random
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from qarl.config.base import NonNegativeFloat
from qarl.errors import DAMAGED, OTHER_VERSION, CheckpointError, DataError
from qarl.prompts.lineage import Forest
from qarl.prompts.stats import Record
from qarl.types import Prompt

VERSION = 2
Int64 = Annotated[int, Field(ge=0, lt=2**63)]
WHERE = "prompt pool state"
COLUMNS = dict.fromkeys(("ticket", "successes", "trials", "estimate", "alarm_base"), "d")
COLUMNS |= dict.fromkeys(("arrival", "visits", "last_step"), "q")
"""Fields of a record that are saved, with their type in `array`: float64 or int64."""


class Gauges(BaseModel):
    """Scalars of the pool that are saved as they are."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    zero_variance_share: NonNegativeFloat = 0.0
    frontier_width: NonNegativeFloat = 0.0
    estimate_error: NonNegativeFloat = 0.0
    clock: NonNegativeFloat = 0.0
    arrivals: Int64 = 0
    unknown_results: Int64 = 0
    evicted: Int64 = 0
    refused: Int64 = 0
    reinserted: Int64 = 0
    reinsert_step: Annotated[int, Field(ge=-1)] = -1
    refresh_step: Annotated[int, Field(ge=-1)] = -1


@dataclass(frozen=True)
class Archived:
    """An evicted prompt, and the step at which it was evicted or last rejected."""

    record: Record
    step: int


@dataclass(frozen=True)
class Saved:
    """A checked state."""

    rng: Random
    records: list[Record]
    in_flight: frozenset[str]
    cooling: frozenset[str]
    retired: frozenset[str]
    grown: set[str]
    lineage: Forest
    archive: dict[str, Archived]
    forgotten: set[str]
    gauges: Gauges


def columns(records: Sequence[Record]) -> dict[str, str]:
    """One column for each saved field: 8 bytes a value in this machine's order, in base64, which JSON writes fast."""
    packed = {name: array(kind, [getattr(record, name) for record in records]) for name, kind in COLUMNS.items()}
    return {name: base64.b64encode(column.tobytes()).decode() for name, column in packed.items()}


def row(record: Record) -> dict[str, float | None]:
    """The saved fields of one record; None for NaN, which JSON lacks."""
    values = {name: getattr(record, name) for name in COLUMNS}
    return {name: None if value != value else value for name, value in values.items()}


def prompt_to_json(prompt: Prompt) -> dict[str, Any]:
    return asdict(prompt) | {"token_ids": list(prompt.token_ids)}


def parse(state: Mapping[str, Any], task: Sequence[Prompt]) -> Saved:
    """Check `state` against the prompts of the task.

    Raises CheckpointError: another version, other prompt ids, incomplete or contradictory.
    """
    version = state.get("version") if isinstance(state, Mapping) else None
    if version != VERSION:
        raise CheckpointError(f"version {version}, this qarl reads {VERSION}", WHERE, OTHER_VERSION)
    try:
        saved = _parse(state, {prompt.id: prompt for prompt in task})
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, DataError) as error:
        raise CheckpointError(f"incomplete or damaged ({' '.join(repr(error).split())})", WHERE, DAMAGED) from error
    ids = {record.prompt.id for record in saved.records}
    resting = [saved.in_flight, saved.cooling, saved.retired]
    together = frozenset().union(*resting)
    if len(ids) < len(saved.records) or sum(map(len, resting)) > len(together) or not together <= ids:
        raise CheckpointError("a prompt is unknown or in two states", WHERE, DAMAGED)
    if ids & saved.archive.keys() or not saved.lineage.nodes() <= ids:
        raise CheckpointError("archive or lineage contradict the prompts", WHERE, DAMAGED)
    return saved


def _parse(state: Mapping[str, Any], by_id: Mapping[str, Prompt]) -> Saved:
    grown = {row["id"]: _prompt(row) for row in state["grown"]}
    known = {**by_id, **grown}
    ids, forgotten = list(state["ids"]), set(state["forgotten"])
    _check_ids({*ids, *state["archive"], *forgotten} - grown.keys(), by_id)
    rng = Random()
    rng.setstate((Random.VERSION, tuple(state["rng"]), None))
    lineage = Forest()
    for child, parent, difficulty in state["lineage"]:
        lineage.link(child, parent, difficulty)
    columns = [unpack(kind, state["columns"][name], len(ids)) for name, kind in COLUMNS.items()]
    return Saved(
        rng=rng,
        records=[_record(known[prompt_id], *values) for prompt_id, *values in zip(ids, *columns, strict=True)],
        in_flight=frozenset(state["in_flight"]),
        cooling=frozenset(state["cooling"]),
        retired=frozenset(state["retired"]),
        grown=set(grown),
        lineage=lineage,
        archive={
            prompt_id: Archived(_archived_record(known[prompt_id], entry["row"]), int(entry["step"]))
            for prompt_id, entry in state["archive"].items()
        },
        forgotten=forgotten,
        gauges=Gauges.model_validate(state["gauges"]),
    )


def _prompt(row: Mapping[str, Any]) -> Prompt:
    """Raises TypeError when `row` is not a valid prompt."""
    lists = {"token_ids": tuple(row["token_ids"]), "other_answers": tuple(row.get("other_answers", ()))}
    prompt = Prompt(**{**row, **lists})
    texts, numbers = (prompt.id, prompt.text, prompt.answer), (*prompt.token_ids, prompt.level)
    if not all(isinstance(text, str) for text in texts) or not all(type(number) is int for number in numbers):
        raise TypeError(f"{prompt!r:.80} is not a prompt")
    return prompt


def _check_ids(ids: set[str], by_id: Mapping[str, Prompt]) -> None:
    foreign = sorted(ids ^ by_id.keys())
    if foreign:
        what = f"{len(foreign)} prompt ids are not in both the state and the task, first '{foreign[0]}'"
        raise CheckpointError(what, WHERE, hint="resume with the task data that the run began with")


def unpack(kind: str, text: str, length: int) -> array[Any]:
    """A column as `columns` wrote it. Raises ValueError when it is damaged."""
    column: array[Any] = array(kind)
    column.frombytes(base64.b64decode(text, validate=True))
    if len(column) != length:
        raise ValueError(f"{len(column)} values for {length} prompts")
    return column


def _archived_record(prompt: Prompt, row: Mapping[str, float | None]) -> Record:
    """Raises ValueError, TypeError or OverflowError when a value is missing or not of its column's type."""
    if row.keys() != COLUMNS.keys():
        raise ValueError(f"fields {sorted(row)}")
    values = {name: math.nan if value is None else value for name, value in row.items()}
    return _record(prompt, *(array(kind, [values[name]])[0] for name, kind in COLUMNS.items()))


def _record(prompt: Prompt, *values: float) -> Record:
    """From values in the order of COLUMNS. Raises ValueError when one is impossible; only an estimate may be NaN."""
    ticket, successes, trials, estimate, alarm_base, arrival, visits, last_step = values
    measured = 0.0 <= successes <= trials < math.inf and visits >= 0 and (visits > 0) == (trials > 0.0)
    estimated = estimate != estimate or 0.0 <= estimate <= 1.0
    visited = last_step >= 0 if visits else last_step == -1
    ordered = 0.0 <= ticket < 1.0 and 0.0 <= alarm_base < math.inf and arrival >= 0
    if not (measured and estimated and visited and ordered):
        raise ValueError(f"prompt '{prompt.id}' has impossible statistics")
    return Record(prompt, **dict(zip(COLUMNS, values, strict=True)))  # type: ignore[arg-type]

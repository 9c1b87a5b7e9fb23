"""The batches of a run as files, and training on them again without an engine; see `debug` in the config."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt

from qarl.config.run import Config
from qarl.config.schedule import scheme_at
from qarl.errors import DataError, ObjectiveError
from qarl.metrics import Value
from qarl.protocols import Learner, UpdateResult
from qarl.types import TrainSequence

Array = npt.NDArray[Any]
ARRAYS: dict[str, type] = {
    "prompt_ids": np.int64,
    "response_ids": np.int64,
    "sampler_logprobs_T": np.float32,
    "prox_logprobs_T": np.float32,
    "loss_mask_T": np.bool_,
    "sampled_T": np.bool_,
    "versions_T": np.int64,
}
"""Fields of a `TrainSequence` with a value for each token; a file holds those of all sequences, joined."""
SCALARS = ("advantage", "version", "id")


def batch_file(folder: Path, step: int) -> Path:
    return folder / f"step-{step}.npz"


def save_batch(file: Path, minibatches: Sequence[Sequence[TrainSequence]]) -> None:
    """Write the minibatches of one step as plain arrays, without pickle. A length of -1 stands for None."""
    sequences = [sequence for minibatch in minibatches for sequence in minibatch]
    arrays: dict[str, Array] = {name: np.array([getattr(s, name) for s in sequences]) for name in SCALARS}
    arrays["minibatches"] = np.array([len(minibatch) for minibatch in minibatches], dtype=np.int64)
    for name, dtype in ARRAYS.items():
        values = [getattr(sequence, name) for sequence in sequences]
        arrays[f"{name}_lengths"] = np.array([-1 if v is None else len(v) for v in values], dtype=np.int64)
        arrays[name] = np.concatenate([np.zeros(0, dtype), *(np.asarray(v, dtype) for v in values if v is not None)])
    file.parent.mkdir(parents=True, exist_ok=True)
    np.savez(file, allow_pickle=False, **arrays)


def load_batch(file: Path) -> list[list[TrainSequence]]:
    """The minibatches that `save_batch` has written, equal in every bit. Raises DataError."""
    try:
        with np.load(file, allow_pickle=False) as stored:
            arrays = dict(stored)
        columns: dict[str, list[Any]] = {name: arrays[name].tolist() for name in SCALARS}
        columns |= {name: _parts(arrays[name], arrays[f"{name}_lengths"]) for name in ARRAYS if name in arrays}
        for name in ("prompt_ids", "response_ids"):
            columns[name] = [tuple(ids.tolist()) for ids in columns[name]]
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        return _parts([TrainSequence(**row) for row in rows], arrays["minibatches"])
    except (OSError, BadZipFile, EOFError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"no batch that `debug.save_batches` has written ({error})", str(file), "save it again"
        ) from error


def _parts(joined: Any, lengths: Array) -> list[Any]:
    """`joined` cut into parts of `lengths`; None for a length of -1."""
    ends = np.maximum(lengths, 0).cumsum()
    return [None if n < 0 else joined[end - n : end] for end, n in zip(ends.tolist(), lengths.tolist(), strict=True)]


def train_from(folder: Path, config: Config, learner: Learner) -> Iterator[tuple[int, list[int], dict[str, Value]]]:
    """Train on the batches in `folder` of steps 1 to `train.steps`: the same updates, and so the same weights, as in
    the run that has saved them. Yields each step, the lengths of its responses, and its metrics."""
    for step in range(1, config.train.steps + 1):
        scheme = scheme_at(config.rollout, step)
        if scheme != scheme_at(config.rollout, max(1, step - 1)):
            learner.switch(scheme)
        minibatches = load_batch(batch_file(folder, step))
        lengths = [sum(end - start for start, end in s.turns) for minibatch in minibatches for s in minibatch]
        yield step, lengths, update(learner, minibatches, step).all_metrics() if minibatches else {}


def update(learner: Learner, minibatches: Sequence[Sequence[TrainSequence]], step: int) -> UpdateResult:
    """The learner's update. An ObjectiveError names the step."""
    try:
        return learner.update(minibatches)
    except ObjectiveError as error:
        raise type(error)(error.what, f"step {step}", error.hint) from error

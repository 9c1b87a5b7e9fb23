"""Problems from rows: no question twice, none of the held-out ones among the training rows, files mixed by weight."""

import random
import re
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from qarl.config.task import CustomTaskConfig, DataFileConfig, DatasetTaskConfig
from qarl.errors import DataError
from qarl.tasks.files import raw_rows
from qarl.tasks.rows import Row, read_rows
from qarl.tasks.task import NOTHING, Encode, Log, TemplateTask, log_shortage, shares, take_evenly
from qarl.tasks.text import plain
from qarl.types import Prompt


@dataclass(frozen=True)
class Part:
    """Rows of one file or function called `title`; `weight` as in the config."""

    title: str
    rows: Sequence[Row]
    weight: float | None = None


class RowsTask(TemplateTask):
    """Problems from rows. Raises ConfigError unless the prompt template has `{question}` once."""

    def __init__(
        self,
        config: DatasetTaskConfig | CustomTaskConfig,
        encode: Encode,
        special: re.Pattern[str] = NOTHING,
    ) -> None:
        super().__init__(config, encode, special)
        self._secret: list[str] = []  # all held-out questions, also those that no evaluation takes

    @abstractmethod
    def parts(self, seed: int, log: Log) -> tuple[list[Part], dict[str, Part]]:
        """Training rows, and the held-out sets by name. Raises DataError."""

    def load(self, seed: int, num_heldout: int, log: Log) -> tuple[list[Prompt], list[Prompt]]:
        """Repeated questions (the first stays), and training rows whose question is held out, even in another case or
        typography, are dropped; `log` gets a line with their number and the first of them."""
        train, heldout = self.parts(seed, log)
        train = _distinct(train, log)
        sets = {name: _distinct([part], log)[0] for name, part in heldout.items()}
        self._secret = [row.question for part in sets.values() for row in part.rows]
        kept = mix(_unseen(train, list(sets.values()), log), seed, log)
        chosen = take_evenly((_by_level(name, part.rows, seed) for name, part in sets.items()), num_heldout)
        log_shortage("held-out", len(chosen), num_heldout, log)
        several = len(sets) > 1
        return [self._problem(row) for row in kept], [
            replace(self._problem(row), heldout_set=name if several else "") for name, row in chosen
        ]

    def _problem(self, row: Row) -> Prompt:
        fields = {"source": row.source, "other_answers": row.answers[1:], "metadata": row.metadata}
        return self._prompt("row", row.question, row.answers[0], row.level, row.turns, row.where, **fields)

    def heldout_questions(self) -> Iterable[str]:
        return self._secret


class DatasetTask(RowsTask):
    """Rows of files."""

    def __init__(self, config: DatasetTaskConfig, encode: Encode, special: re.Pattern[str] = NOTHING) -> None:
        super().__init__(config, encode, special)
        self._train, self._heldout = config.train_path, config.heldout_path

    def parts(self, seed: int, log: Log) -> tuple[list[Part], dict[str, Part]]:
        train = [Part(file.path, read_file(file, log), file.weight) for file in self._train]
        return train, {name: Part(file.path, read_file(file, log)) for name, file in self._heldout.items()}


def read_file(file: DataFileConfig, log: Log) -> list[Row]:
    """The problems of one file. Raises DataError that names the row."""
    return read_rows(raw_rows(file.path), file.path, file, log)


def mix(parts: Sequence[Part], seed: int, log: Log) -> list[Row]:
    """The rows of all parts, in order; of parts with weights as many, drawn by `seed`, as their shares allow.

    Raises DataError: that is none of a part.
    """
    weights = [part.weight for part in parts if part.weight is not None]
    if not weights:
        return [row for part in parts for row in part.rows]
    total = min(len(part.rows) / weight for part, weight in zip(parts, weights, strict=True)) * sum(weights)
    mixed: list[Row] = []
    for part, n in zip(parts, shares(total, weights), strict=True):
        n = min(n, len(part.rows))
        if n == 0:
            raise DataError(f"its weight takes none of its {len(part.rows)} rows", part.title, "raise it")
        log(f"{part.title}: {n} of {len(part.rows)} rows, by weight")
        drawn = random.Random(f"mix/{seed}/{part.title}").sample(range(len(part.rows)), n)
        mixed += [part.rows[index] for index in sorted(drawn)]
    return mixed


def _by_level(name: str, rows: Sequence[Row], seed: int) -> Iterator[tuple[str, Row]]:
    """The rows of a held-out set, each with its name, shuffled and evenly over the levels."""
    shuffled = list(rows)
    random.Random(seed).shuffle(shuffled)
    by_level: dict[int, list[Row]] = defaultdict(list)
    for row in shuffled:
        by_level[row.level].append(row)
    streams = [iter(by_level[level]) for level in sorted(by_level)]
    return ((name, row) for row in take_evenly(streams, len(rows)))


def _distinct(parts: Iterable[Part], log: Log) -> list[Part]:
    """The parts without rows whose key was seen before, in any of them. Raises DataError: nothing is left of one."""
    first: dict[str, Row] = {}
    kept = []
    for part in parts:
        repeated = [row for row in part.rows if first.setdefault(row.key, row) is not row]
        if repeated:
            again, before = repeated[0].where, first[repeated[0].key].where
            what = f"dropped {len(repeated)} rows with a question seen before, the first is {again}, as {before}"
            log(f"{part.title}: {what}")
        if len(repeated) == len(part.rows):
            raise DataError("every question was seen before, in another file", part.title, "leave the file out")
        kept.append(replace(part, rows=[row for row in part.rows if first[row.key] is row]))
    return kept


def _unseen(parts: Iterable[Part], heldout: Sequence[Part], log: Log) -> list[Part]:
    """The training parts without rows whose question is held out. Raises DataError when nothing is left of one."""
    secret = {plain(row.key) for part in heldout for row in part.rows}  # training rows may differ by case: A and a
    kept = []
    for part in parts:
        rows: list[Row] = []
        leaked: list[Row] = []
        for row in part.rows:
            (leaked if plain(row.key) in secret else rows).append(row)
        if leaked:
            log(f"{part.title}: dropped {len(leaked)} rows whose question is held out, the first is {leaked[0].where}")
        if not rows:
            what = f"every question is also in {' or '.join(p.title for p in heldout)}"
            raise DataError(what, part.title, "hold out other rows")
        kept.append(replace(part, rows=rows))
    return kept

"""Problems from a function or class of the user's own; docs/tasks.md has the protocol."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from qarl.config.task import CustomTaskConfig, SetName
from qarl.errors import TRACEBACK, ConfigError, DataError, QarlError, first_line
from qarl.hooks import check_call, load_function
from qarl.tasks.dataset import Part, RowsTask
from qarl.tasks.rows import RawRow, read_rows
from qarl.tasks.task import NOTHING, Encode, Log

WHERE = "task.function"
HELDOUT = TypeAdapter(Annotated[dict[SetName, Any], Field(min_length=1)])


class CustomTask(RowsTask):
    """What `task.function` makes, with its `solve` and `teacher` where it has them.

    Raises ConfigError: it cannot be loaded, called or made.
    """

    def __init__(self, config: CustomTaskConfig, encode: Encode, special: re.Pattern[str] = NOTHING) -> None:
        super().__init__(config, encode, special)
        self._config = config
        self._make = _made(config)
        self.solve = getattr(self._make, "solve", None)
        self.teacher = getattr(self._make, "teacher", None)

    def parts(self, seed: int, log: Log) -> tuple[list[Part], dict[str, Part]]:
        name = self._config.function
        try:
            train, heldout = self._make(seed)
            sets = HELDOUT.validate_python(heldout if isinstance(heldout, Mapping) else {"heldout": heldout})
            return [self._part(f"{name}: training", train, log)], {
                title: self._part(f"{name}: held-out set '{title}'", rows, log) for title, rows in sets.items()
            }
        except QarlError:
            raise
        except ValidationError as error:
            what = f"its held-out sets: {first_line(error.errors()[0]['msg'])}"
            raise DataError(what, name, "name them with letters, digits, '.', '_' and '-'") from error
        except Exception as error:  # the user's code may raise anything
            hint = "it must return training rows, and held-out rows or a dict of such sets"
            raise DataError(f"{type(error).__name__}: {first_line(error)}", name, hint) from error

    def _part(self, title: str, rows: Iterable[Any], log: Log) -> Part:
        return Part(title, read_rows(_numbered(title, rows), title, self._config, log))


def _made(config: CustomTaskConfig) -> Callable[[int], Any]:
    """What takes the seed and returns the rows."""
    hook, kwargs = load_function(config.function, WHERE), config.kwargs
    if not isinstance(hook, type):
        check_call(hook, ["seed"], kwargs, WHERE)
        return partial(hook, **kwargs)
    check_call(hook, [], kwargs, WHERE)
    try:
        made = hook(**kwargs)
    except Exception as error:  # the user's code may raise anything
        raise ConfigError(
            f"{config.function}: {type(error).__name__}: {first_line(error)}", WHERE, TRACEBACK
        ) from error
    if not callable(made):
        raise ConfigError(f"{config.function} has no method __call__(self, seed)", WHERE, "add it: it returns the rows")
    check_call(made, ["seed"], {}, WHERE)
    return made


def _numbered(title: str, rows: Iterable[Any]) -> Iterator[RawRow]:
    for number, row in enumerate(rows, start=1):
        where = f"{title} row {number}"
        if not isinstance(row, Mapping):
            raise DataError(f"is {row!r:.60}, not a dict", where, "yield a dict for each row")
        yield where, row

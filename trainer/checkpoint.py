"""Checkpoints on disk: whole or absent, whatever instant the process dies at."""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from qarl.errors import CheckpointError

SCHEMA = 1


class CheckpointStore:
    """`directory`/step_000018/{learner/, state.json}; a folder that is still being written ends in `.part`."""

    def __init__(self, directory: Path, keep: int) -> None:
        self._directory, self._keep = directory, keep

    def save(self, step: int, save_learner: Callable[[str], None], state: Mapping[str, Any]) -> None:
        """Write the checkpoint of `step` and drop all but the newest `keep`."""
        final = self._directory / f"step_{step:06d}"
        part = final.with_suffix(".part")
        shutil.rmtree(part, ignore_errors=True)
        (part / "learner").mkdir(parents=True)
        save_learner(str((part / "learner").resolve()))
        with open(part / "state.json", "w") as file:
            json.dump({"schema": SCHEMA, "step": step, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        shutil.rmtree(final, ignore_errors=True)
        part.rename(final)
        for old in self._complete()[: -self._keep]:
            shutil.rmtree(old)

    def latest(self) -> tuple[str, dict[str, Any]] | None:
        """(learner folder, state) of the newest complete checkpoint; None when there is none.

        Raises:
            CheckpointError: `state.json` is missing, damaged, of another schema, or tells no step.
        """
        complete = self._complete()
        if not complete:
            return None
        file = complete[-1] / "state.json"
        try:
            state = dict(json.loads(file.read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(
                f"unreadable: {error}", where=str(file), hint="delete the folder to use the one before"
            ) from error
        if state.get("schema") != SCHEMA:
            raise CheckpointError(f"schema {state.get('schema')}, this version reads {SCHEMA}", where=str(file))
        if not isinstance(state.get("step"), int):
            raise CheckpointError("it tells no step", where=str(file), hint="delete the folder to use the one before")
        return str((complete[-1] / "learner").resolve()), state

    def _complete(self) -> list[Path]:
        return sorted(p for p in self._directory.glob("step_*") if p.suffix != ".part")

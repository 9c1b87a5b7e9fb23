"""Checkpoints on disk: whole or absent, whatever instant the process dies at, and unchanged since, or not used."""

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from errno import EINVAL, ENOTSUP
from hashlib import file_digest
from pathlib import Path
from typing import Any

from qarl.errors import CheckpointError, QarlError

SCHEMA = 2
MANIFEST = "manifest.json"
STEP = r"step_\d{6,}"


class CheckpointStore:
    """`directory`/step_000018/{learner/, state.json, manifest.json}; a folder that is still being written ends in
    `.part`. The manifest has the SHA-256 of every other file."""

    def __init__(self, directory: Path, keep: int) -> None:
        self._directory, self._keep = directory, keep

    def save(self, step: int, save_learner: Callable[[str], None], state: Mapping[str, Any]) -> None:
        """Write the checkpoint of `step`, and drop all but the newest `keep` up to that step.

        Raises QarlError when it cannot be written: nothing of it is left, and the checkpoints before are.
        """
        final = self._directory / f"step_{step:06d}"
        part = final.with_suffix(".part")
        try:
            shutil.rmtree(part, ignore_errors=True)
            (part / "learner").mkdir(parents=True)
            save_learner(str((part / "learner").resolve()))
            (part / "state.json").write_text(json.dumps({"schema": SCHEMA, "step": step, **state}))
            (part / MANIFEST).write_text(json.dumps(_digests(part)))
            for path in (part, *part.rglob("*")):
                _to_disk(path)
            shutil.rmtree(final, ignore_errors=True)
            part.rename(final)
            _to_disk(self._directory)
        except OSError as error:
            raise QarlError(f"cannot be written: {error}", str(final), "make room, and start the run again") from error
        finally:
            shutil.rmtree(part, ignore_errors=True)  # of a checkpoint that failed; it would fill the disk
        folders = self._complete()
        end = folders.index(final) + 1  # later ones are damaged: the run went back behind them
        for old in folders[: max(0, end - self._keep)] + folders[end:]:
            shutil.rmtree(old)

    def latest(self, log: Callable[[str], None]) -> tuple[str, dict[str, Any]] | None:
        """(learner folder, state) of the newest checkpoint that is whole and unchanged; None when there is none at all.

        `log` gets a line for each newer one that is damaged.
        Raises CheckpointError: there are checkpoints, but none can be used, or a folder beside them is no checkpoint.
        """
        for other in self._directory.glob("step_*"):
            if not re.fullmatch(STEP, other.name) and other.suffix != ".part":
                raise CheckpointError("is called like no checkpoint", str(other), "move it elsewhere")
        damaged: list[CheckpointError] = []
        for folder in reversed(self._complete()):
            try:
                state = _read(folder)
            except CheckpointError as error:
                damaged.append(error)
                continue
            for problem in damaged:
                log(f"{problem}; going back to the checkpoint of step {state['step']}")
            return str((folder / "learner").resolve()), state
        if damaged:
            newest, hint = damaged[0], "no other checkpoint is whole: start over, or choose another run.name"
            raise CheckpointError(newest.what, newest.where, hint) from newest
        return None

    def clean(self) -> None:
        """Remove what writers that were killed have left."""
        for part in self._directory.glob("step_*.part"):
            shutil.rmtree(part, ignore_errors=True)

    def _complete(self) -> list[Path]:
        """The folders of complete checkpoints, oldest first."""
        return sorted((path for path in self._directory.glob("step_*") if re.fullmatch(STEP, path.name)), key=_step)


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def _read(folder: Path) -> dict[str, Any]:
    """The state of a checkpoint. Raises CheckpointError: a file is missing or changed, or of another version."""
    try:
        state = dict(json.loads((folder / "state.json").read_text()))
        if state.get("schema") != SCHEMA:
            raise CheckpointError(f"schema {state.get('schema')}, this version reads {SCHEMA}", str(folder))
        before, now = dict(json.loads((folder / MANIFEST).read_text())), _digests(folder)
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"unreadable: {error}", str(folder)) from error
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            change = "is missing" if name not in now else "has changed" if name in before else "does not belong to it"
            raise CheckpointError(f"its {name} {change}", str(folder))
    if state.get("step") != _step(folder):
        raise CheckpointError(f"it is of step {state.get('step')}", str(folder))
    return state


def _digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a checkpoint but the manifest."""
    digests = {}
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != MANIFEST:
            with path.open("rb") as file:
                digests[name] = file_digest(file, "sha256").hexdigest()
    return digests


def _to_disk(path: Path) -> None:
    """Wait until a file or folder is on the disk itself: what a rename makes visible survives a loss of power."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    except OSError as error:
        if not (path.is_dir() and error.errno in (EINVAL, ENOTSUP)):  # some network file systems sync files only
            raise
    finally:
        os.close(opened)

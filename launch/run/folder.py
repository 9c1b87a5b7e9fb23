"""The folder of a run: which run it belongs to, how far that run got, and how a new run takes its place."""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from launch.run.files import SUMMARY_FILE, unusable, write_whole
from launch.run.report import read_summary
from launch.run.resume import CONFIG_FILE, INPUTS_FILE, START_OVER, changed_inputs, check_same_run
from launch.run.tracking import AUGMENT_FILE, METRICS_FILE, SAMPLES_FILE, read_log
from launch.run.wandb_run import WANDB_ID_FILE
from qarl.config.io import to_yaml
from qarl.config.run import Config
from qarl.errors import ConfigError, UsageError
from qarl.quant.scheme import QuantScheme
from trainer.checkpoint import CheckpointStore

CHECKPOINTS = "checkpoints"
LOGS = "logs"
ELSEWHERE = "remove it yourself, or choose another run.name"
FILES = (METRICS_FILE, SAMPLES_FILE, AUGMENT_FILE, SUMMARY_FILE, INPUTS_FILE, WANDB_ID_FILE)

Log = Callable[[str], None]


class RunFolder:
    """The folder that `config.run` names. `log` gets what a user should know about its state.

    Attributes:
        saved: learner folder and state of the checkpoint to continue from; None when the run starts at the beginning.
        step: the last step that is done.
        is_complete: whether nothing is left to do.

    Raises:
        ConfigError: the folder belongs to a run with other settings, lacks a part, or is no folder of a run.
        DataError: a log of the run is damaged.
        CheckpointError: no checkpoint is whole.
    """

    def __init__(self, config: Config, log: Log) -> None:
        self._config, self._log = config, log
        self.path = config.run.folder
        self.checkpoints = CheckpointStore(self.path / CHECKPOINTS, config.train.keep_checkpoints)
        self.saved: tuple[str, dict[str, Any]] | None = None
        self.is_complete = False
        try:
            self._check_files()
            if config.run.resume and (self.path / CONFIG_FILE).exists():
                self._find_state()
        except OSError as error:
            raise unusable(self.path, error) from error
        self.step: int = self.saved[1]["step"] if self.saved else 0

    @property
    def logs(self) -> Path:
        """The folder of the logs."""
        return self.path / LOGS

    @property
    def nothing_left(self) -> str:
        """The line of a run that is complete."""
        return f"{self.path} is complete; a larger `train.steps` continues it, `run.resume=false` starts it over"

    def engine_dir(self, scheme: QuantScheme) -> Path:
        """The folder of the engine's model config in `scheme`."""
        return self.path / f"engine_model-{scheme.label}"

    @contextmanager
    def begin(self, inputs: Mapping[str, str]) -> Iterator[None]:
        """Make the folder for a run on `inputs`, digests by name.

        A run that is started over is kept under another name until this one has ended well. When this one is refused
        before it has logged anything, everything is again as it was.
        """
        if self.saved and (changed := changed_inputs(self.path, inputs)):
            self._log(f"changed since the run began: {', '.join(changed)}; the run goes on with what is there now")
        backup_dir = None if self._config.run.resume else _move_to_backup(self.path)
        if backup_dir:
            self._log(f"starting over; the old run lies in {backup_dir} until this one has ended well")
        is_new, existed = not (self.path / CONFIG_FILE).exists(), self.path.exists()
        before = set(self.path.iterdir()) if existed else set()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.checkpoints.clean()
            write_whole(self.path / CONFIG_FILE, to_yaml(self._config))
            if not self.saved:
                write_whole(self.path / INPUTS_FILE, json.dumps(inputs, indent=1))
            yield
        except UsageError:
            if is_new and not read_log(self.path / METRICS_FILE):
                for made in set(self.path.iterdir()) - before:
                    shutil.rmtree(made) if made.is_dir() else made.unlink()
                if not existed:
                    self.path.rmdir()
                if backup_dir:
                    backup_dir.rename(self.path)
            raise
        for backup in _backups(self.path):
            shutil.rmtree(backup)

    def _check_files(self) -> None:
        """Raises ConfigError: a file where a folder must be, the reverse, or parts of a run without its config."""
        config_file = self.path / CONFIG_FILE
        _check_kind(self.path, Path.is_dir, "folder", ELSEWHERE)
        if not self._config.run.resume:  # the old run moves as a whole, damaged or not
            if self.path.exists() and not config_file.is_file():
                raise ConfigError("is no run's folder", str(self.path), ELSEWHERE)
            return
        _check_kind(config_file, Path.is_file, "file", ELSEWHERE)
        folders, files = [self.path / name for name in (CHECKPOINTS, LOGS)], [self.path / name for name in FILES]
        for path in folders:
            _check_kind(path, Path.is_dir, "folder", START_OVER)
        for path in files:
            _check_kind(path, Path.is_file, "file", START_OVER)
        parts = [path.name for path in (*folders[:1], *files) if path.exists()]
        if parts and not config_file.exists():
            what = f"has {parts[0]}, but no {CONFIG_FILE}: which run it belongs to is not known"
            raise ConfigError(what, str(self.path), "put that file back, or choose another run.name")

    def _find_state(self) -> None:
        """How far the run in the folder got. Raises as the constructor does."""
        before = check_same_run(self._config, self.path)
        summary = read_summary(self.path) if (self.path / SUMMARY_FILE).exists() else None
        if summary and summary.steps >= self._config.train.steps:
            self.is_complete = True
            return
        logged = max((row["step"] for row in read_log(self.path / METRICS_FILE)), default=-1)
        self.saved = self.checkpoints.latest(self._log)
        if self.saved is None:
            if summary or logged > before.train.checkpoint_every:
                raise ConfigError(f"has logged {logged} steps, but has no checkpoint", str(self.path), START_OVER)
            self._log(f"{self.path}: the run ended before its first checkpoint; it begins again")
        elif logged < self.saved[1]["step"]:
            what = f"ends at step {logged}, the checkpoint is of step {self.saved[1]['step']}"
            raise ConfigError(what if logged >= 0 else "is missing or empty", str(self.path / METRICS_FILE), START_OVER)


def _check_kind(path: Path, is_kind: Callable[[Path], bool], kind: str, hint: str) -> None:
    """Raises ConfigError: `path` exists, or is a link to nothing, and is of another kind."""
    if (path.is_symlink() or path.exists()) and not is_kind(path):
        raise ConfigError(f"is no {kind}", str(path), hint)


def _move_to_backup(run_dir: Path) -> Path | None:
    """Rename the old run; returns its new folder, or None when there is no old run."""
    if not run_dir.exists():
        return None
    numbers = [int(backup.name.rpartition("-")[2]) for backup in _backups(run_dir)]
    return run_dir.rename(run_dir.with_name(f".{run_dir.name}.replaced-{max(numbers, default=0) + 1}"))


def _backups(run_dir: Path) -> list[Path]:
    """Backups of old runs. No run has such a name, because a run's name never begins with a dot."""
    return [path for path in run_dir.parent.glob(f".{run_dir.name}.replaced-*") if path.name[-1].isdigit()]

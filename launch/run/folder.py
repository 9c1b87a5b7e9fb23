"""The folder of a run: which run it belongs to, how far that run got, and how a new run takes its place."""

import shutil
from pathlib import Path

from launch.run.report import SUMMARY_FILE
from launch.run.resume import check_same_run
from qarl.config.io import to_yaml
from qarl.config.run import Config
from qarl.errors import ConfigError
from qarl.quant.scheme import QuantScheme
from trainer.checkpoint import CheckpointStore

CONFIG_FILE = "config.yaml"


class RunFolder:
    """The folder that `config.run` names.

    Attributes:
        saved: learner folder and state of the newest checkpoint; None when the run starts at the beginning.
        step: the last step that is done.
        is_complete: whether nothing is left to do.

    Raises:
        ConfigError: the folder belongs to a run with other settings.
        CheckpointError: the newest checkpoint is damaged.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self.path = Path(config.run.dir) / config.run.name
        self.checkpoints = CheckpointStore(self.path / "checkpoints", config.train.keep_checkpoints)
        self.saved = self.checkpoints.latest() if config.run.resume else None
        if self.saved:
            check_same_run(config, self.path)
        self.step: int = self.saved[1]["step"] if self.saved else 0
        done = self.saved is not None and self.step >= config.train.steps
        self.is_complete = done and (self.path / SUMMARY_FILE).exists()

    @property
    def logs(self) -> Path:
        """The folder of the logs."""
        return self.path / "logs"

    def engine_dir(self, scheme: QuantScheme) -> Path:
        """The folder of the engine's model config in `scheme`."""
        return self.path / f"engine_model-{scheme.label}"

    def prepare(self) -> Path | None:
        """Make the folder and write the config; returns where a run that is started over lies, if there is one."""
        backup_dir = None if self._config.run.resume else set_aside(self.path)
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / CONFIG_FILE).write_text(to_yaml(self._config))
        return backup_dir


def set_aside(run_dir: Path) -> Path | None:
    """Make room for a new run; the old one is kept under another name until the new one has ended well.

    Raises ConfigError when the folder does not belong to a run.
    """
    if not run_dir.exists():
        return None
    if not (run_dir / CONFIG_FILE).is_file():
        raise ConfigError(f"{run_dir} is no run's folder", "", "remove it yourself, or choose another run.name")
    backup_dir = run_dir.with_name(f"{run_dir.name}.replaced")
    if backup_dir.exists() and not (run_dir / SUMMARY_FILE).exists():
        shutil.rmtree(run_dir)  # the previous start-over failed: the backup is still the run to keep
        return backup_dir
    if backup_dir.exists():
        shutil.rmtree(backup_dir)
    run_dir.rename(backup_dir)
    return backup_dir

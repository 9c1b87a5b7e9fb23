"""A run's metrics for TensorBoard, in the folder `tensorboard` of the run."""

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from launch.run.metric_table import section_of
from qarl.errors import ConfigError
from qarl.metrics import Histogram, Value
from qarl.protocols import Tracker


class TensorboardTracker(Tracker):
    """Numbers by section, and notes; histograms and tables stay in the run's own files."""

    def __init__(self, run_dir: Path, start_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # A resumed run makes later steps again: TensorBoard drops those that are already there.
        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=start_step + 1 if start_step else None)

    def log(self, step: int, metrics: Mapping[str, Value]) -> None:
        for name, value in metrics.items():
            if not isinstance(value, Histogram):
                self._writer.add_scalar(f"{section_of(name)}/{name.replace('/', '.')}", float(value), step)

    def alert(self, title: str, text: str) -> None:
        self._writer.add_text(title, text)

    def close(self) -> None:
        self._writer.close()


def check_tensorboard() -> None:
    """Raises ConfigError: the package is not installed."""
    if find_spec("tensorboard") is None:
        hint = "pip install tensorboard, or leave `tensorboard` out"
        raise ConfigError("the package tensorboard is not installed", "tracking.trackers", hint)

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from launch.run import tensorboard
from launch.run.tensorboard import TensorboardTracker, check_tensorboard
from qarl.errors import ConfigError
from qarl.metrics import Histogram


class Writer:
    """Stands for torch's SummaryWriter, whose package is not installed with qarl."""

    def __init__(self, folder: str, purge_step: int | None) -> None:
        self.calls: list[tuple[Any, ...]] = [(folder, purge_step)]

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.calls.append((name, value, step))

    def add_text(self, name: str, text: str) -> None:
        self.calls.append((name, text))

    def close(self) -> None:
        self.calls.append(("closed",))


@pytest.mark.parametrize(("start", "purge"), [(0, None), (4, 5)])
def test_numbers_are_written_by_section(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: int, purge: int | None
) -> None:
    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    tracker = TensorboardTracker(tmp_path, start)
    tracker.log(start + 1, {"error_tokens/share": 0.5, "mine": 2, "w_hist": Histogram((0.0, 1.0), (3,))})
    tracker.alert("reward collapse", "step 5: ...")
    tracker.close()
    assert tracker._writer.calls == [
        (str(tmp_path / "tensorboard"), purge),
        ("error tokens/error_tokens.share", 0.5, start + 1),
        ("other/mine", 2.0, start + 1),
        ("reward collapse", "step 5: ..."),
        ("closed",),
    ]


def test_a_missing_package_is_told_before_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorboard, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"the package tensorboard is not installed; pip install tensorboard, or"):
        check_tensorboard()
    monkeypatch.setattr(tensorboard, "find_spec", lambda name: name)
    check_tensorboard()

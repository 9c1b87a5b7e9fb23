"""A run that exists is continued, kept, or refused with a hint: never overwritten or trusted without a word."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch.run.folder import RunFolder
from launch.run.report import Summary
from qarl.config.io import to_yaml, validate
from qarl.config.run import Config
from qarl.errors import CheckpointError, ConfigError, DataError, KernelError, UsageError

INPUTS = {"training prompts": "1", "held-out prompts": "2"}


def make_config(directory: Path, **sections: dict[str, Any]) -> Config:
    run = {"name": "mine", "dir": str(directory)} | sections.pop("run", {})
    train = {"steps": 6, "checkpoint_every": 2} | sections.pop("train", {})
    return validate(
        {"model": {"path": "none"}, "task": {"kind": "sorting"}, "run": run, "train": train, **sections}, ""
    )


def metrics(path: Path, *steps: int) -> None:
    (path / "metrics.jsonl").write_text("".join(f'{{"step": {step}, "reward/mean": 0.5}}\n' for step in steps))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run that was killed after step 5; its checkpoints are of steps 2 and 4."""
    folder = RunFolder(make_config(tmp_path), print)
    with folder.begin(INPUTS):
        metrics(folder.path, 0, 1, 2, 3, 4, 5)
        for step in (2, 4):
            folder.checkpoints.save(step, lambda directory: Path(directory, "weights").write_text("w") and None, {})
    return folder.path


def end(run: Path, steps: int = 6) -> None:
    fields = {
        "kernels": [],
        "rollouts": 9,
        "train_seconds": 1.0,
        "tokens_per_s": 1.0,
        "eval_before": {},
        "eval_after": {},
    }
    summary = Summary.model_validate({"run": "mine", "scheme": "none", "steps": steps, **fields})
    (run / "summary.json").write_text(summary.model_dump_json())


def test_a_killed_run_continues_after_its_last_checkpoint(tmp_path: Path, run: Path) -> None:
    folder = RunFolder(make_config(tmp_path), print)
    assert folder.saved
    assert folder.saved[0] == str(run / "checkpoints" / "step_000004" / "learner")
    assert (folder.step, folder.is_complete) == (4, False)


def test_a_finished_run_is_complete_unless_more_steps_are_wanted(tmp_path: Path, run: Path) -> None:
    end(run)
    assert RunFolder(make_config(tmp_path), print).is_complete
    assert not RunFolder(make_config(tmp_path, train={"steps": 8}), print).is_complete
    shutil.rmtree(run / "checkpoints")
    assert RunFolder(make_config(tmp_path), print).is_complete


def remove(*names: str) -> Callable[[Path], None]:
    def damage(run: Path) -> None:
        for name in names:
            path = run / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return damage


def replace_by_folder(name: str) -> Callable[[Path], None]:
    def damage(run: Path) -> None:
        remove(name)(run)
        (run / name).mkdir()

    return damage


def replace_by_file(name: str) -> Callable[[Path], None]:
    def damage(run: Path) -> None:
        (run / name).is_dir() and shutil.rmtree(run / name)
        (run / name).write_bytes(b"\xff")

    return damage


def ended(damage: Callable[[Path], None]) -> Callable[[Path], None]:
    def both(run: Path) -> None:
        end(run, steps=5)  # 6 are wanted
        damage(run)

    return both


@pytest.mark.parametrize(
    ("damage", "message"),
    {
        "no checkpoints": (
            remove("checkpoints"),
            "mine: has logged 5 steps, but has no checkpoint; choose another run.name, or start over",
        ),
        "no checkpoints at its end": (ended(remove("checkpoints")), "mine: has logged 5 steps, but has no checkpoint"),
        "no config": (remove("config.yaml"), "mine: has checkpoints, but no config.yaml: which run it belongs to"),
        "no config, no checkpoints": (remove("config.yaml", "checkpoints"), "has metrics.jsonl, but no config.yaml"),
        "no metrics": (
            remove("metrics.jsonl"),
            "metrics.jsonl: is missing or empty; choose another run.name, or start over",
        ),
        "no metrics of the end": (lambda run: metrics(run, 0, 1, 2), "ends at step 2, the checkpoint is of step 4"),
        "odd metrics": (replace_by_file("metrics.jsonl"), "metrics.jsonl: is missing or empty"),
        "other lines in metrics": (
            lambda run: (run / "metrics.jsonl").write_text("{}\n"),
            "metrics.jsonl:1: not a JSON object with a step",
        ),
        "a config that is none": (replace_by_file("config.yaml"), "config.yaml: not YAML"),
        "an empty config": (lambda run: (run / "config.yaml").write_text(""), "config.yaml: model: required"),
        "a summary that is none": (replace_by_file("summary.json"), "summary.json: not a run summary"),
        "a folder of metrics": (replace_by_folder("metrics.jsonl"), "metrics.jsonl: is no file"),
        "a folder of config": (replace_by_folder("config.yaml"), "config.yaml: is no file"),
        "a file of checkpoints": (replace_by_file("checkpoints"), "checkpoints: is no folder"),
        "a file of logs": (replace_by_file("logs"), "logs: is no folder"),
        "a link to nothing": (lambda run: (run / "samples.jsonl").symlink_to("nowhere"), "samples.jsonl: is no file"),
        "another folder": (
            lambda run: (run / "checkpoints/step_old").mkdir(),
            "step_old: is called like no checkpoint",
        ),
    }.values(),
)
def test_what_is_not_understood_is_refused(
    tmp_path: Path, run: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(run)
    before = sorted((path, path.is_file() and path.read_bytes()) for path in run.rglob("*"))
    with pytest.raises(UsageError) as caught:
        RunFolder(make_config(tmp_path), print)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sorted((path, path.is_file() and path.read_bytes()) for path in run.rglob("*")) == before
    if "run.resume=false" in str(caught.value):  # then that helps
        with RunFolder(make_config(tmp_path, run={"resume": False}), print).begin(INPUTS):
            pass


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_again_and_says_so(tmp_path: Path, run: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    metrics(run, 0, 1, 2)  # killed while that of step 2 was written
    said = list[str]()
    folder = RunFolder(make_config(tmp_path), said.append)
    assert folder.saved is None
    assert said == [f"{run}: the run ended before its first checkpoint; it begins again"]


@pytest.mark.parametrize("section", [{"seed": 7}, {"train": {"group_size": 7}}])
def test_without_checkpoints_a_folder_still_belongs_to_one_run(tmp_path: Path, run: Path, section: Any) -> None:
    shutil.rmtree(run / "checkpoints")
    metrics(run, 0)
    with pytest.raises(ConfigError, match="was made with other settings"):
        RunFolder(make_config(tmp_path, **section), print)


def test_a_damaged_checkpoint_goes_back_to_the_one_before(tmp_path: Path, run: Path) -> None:
    (run / "checkpoints/step_000004/learner/weights").write_text("v")
    said = list[str]()
    assert RunFolder(make_config(tmp_path), said.append).step == 2
    assert "its learner/weights has changed; going back to the checkpoint of step 2" in said[0]
    (run / "checkpoints/step_000002/learner/weights").write_text("v")
    with pytest.raises(CheckpointError, match="no other checkpoint is whole"):
        RunFolder(make_config(tmp_path), print)


def test_changed_inputs_are_told_before_a_resumed_run_goes_on(tmp_path: Path, run: Path) -> None:
    said = list[str]()
    folder = RunFolder(make_config(tmp_path), said.append)
    with folder.begin(INPUTS):
        assert said == []
    with folder.begin(INPUTS | {"training prompts": "3", "a.py:reward": "4"}):
        [line] = said
        assert line.startswith("changed since the run began: a.py:reward, training prompts; ")
    (run / "inputs.json").unlink()
    with pytest.raises(ConfigError, match=r"inputs\.json: no digests of the run's inputs"), folder.begin(INPUTS):
        pass


def test_a_run_that_is_started_over_is_kept_until_the_new_one_has_ended_well(tmp_path: Path, run: Path) -> None:
    again = make_config(tmp_path, run={"resume": False}, seed=9)
    (run / "kept").touch()
    for number in (1, 2):
        fails(again, KernelError("in the middle of the run"), lambda path: metrics(path, 0))
        assert not (run / "kept").exists()
        assert sorted(path.name for path in tmp_path.iterdir())[:number] == [
            f".mine.replaced-{i}" for i in range(1, number + 1)
        ]
    assert (tmp_path / ".mine.replaced-1" / "kept").exists()
    with RunFolder(again, print).begin(INPUTS):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def fails(config: Config, error: UsageError | KernelError, write: Callable[[Path], object]) -> None:
    """A run that writes into its folder and then fails."""
    folder = RunFolder(config, print)

    def run() -> None:
        with folder.begin(INPUTS):
            write(folder.path)
            raise error

    with pytest.raises(type(error)):
        run()


@pytest.mark.parametrize("content", [None, "train.log", "config.yaml"])
def test_a_refused_start_leaves_everything_as_it_was(tmp_path: Path, content: str | None) -> None:
    config = make_config(tmp_path, run={"resume": content != "config.yaml"})
    if content:
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / content).write_text(to_yaml(config))

    def write(path: Path) -> None:
        (path / "logs").mkdir()
        (path / "metrics.jsonl").touch()

    fails(config, DataError("told late"), write)
    left = [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")]
    assert left == (["mine", f"mine/{content}"] if content else [])


def test_a_late_refusal_does_not_remove_what_was_logged(tmp_path: Path) -> None:
    fails(make_config(tmp_path), DataError("told very late"), lambda path: metrics(path, 0))
    assert (tmp_path / "mine" / "metrics.jsonl").read_text()


def test_starting_over_needs_a_folder_of_a_run(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    with pytest.raises(ConfigError, match="mine: is no run's folder; remove it yourself"):
        RunFolder(make_config(tmp_path, run={"resume": False}), print)


@pytest.mark.parametrize("make", [Path.touch, lambda path: path.symlink_to("nowhere")])
def test_no_run_is_a_file_or_a_link_to_nothing(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "mine")
    with pytest.raises(ConfigError, match="mine: is no folder; remove it yourself"):
        RunFolder(make_config(tmp_path), print)


def test_the_config_is_there_before_anything_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is killed at any moment leaves a folder that the same command takes."""
    seen: list[list[str]] = []
    whole = Path.replace

    def replaced(path: Path, target: Path) -> Path:
        seen.append(sorted(p.name for p in path.parent.iterdir()))
        return whole(path, target)

    monkeypatch.setattr(Path, "replace", replaced)
    with RunFolder(make_config(tmp_path), print).begin(INPUTS):
        pass
    assert seen == [["config.yaml.part"], ["config.yaml", "inputs.json.part"]]
    assert json.loads((tmp_path / "mine" / "inputs.json").read_text()) == INPUTS

"""Checkpoints are whole or absent."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from errno import EINVAL, EIO, ENOSPC
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qarl.errors import CheckpointError, QarlError
from tests.support.fakes import Killed
from trainer.checkpoint import MANIFEST, SCHEMA, CheckpointStore


def learner(step: int) -> Callable[[str], None]:
    """Writes a file of `step` bytes."""

    def save(directory: str) -> None:
        Path(directory, f"weights_{step}").write_bytes(bytes(step))

    return save


def dies(*_: object) -> None:
    raise Killed


def steps_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_nothing_saved(tmp_path: Path) -> None:
    assert CheckpointStore(tmp_path / "none", keep=2).latest(print) is None


def test_latest_is_what_was_saved(tmp_path: Path) -> None:
    CheckpointStore(tmp_path, keep=2).save(18, learner(18), {"pool": {"rng": [1, 2]}})
    found = CheckpointStore(tmp_path, keep=2).latest(print)
    assert found is not None
    directory, state = found
    assert state == {"schema": SCHEMA, "step": 18, "pool": {"rng": [1, 2]}}
    assert Path(directory) == tmp_path / "step_000018" / "learner"
    assert Path(directory, "weights_18").stat().st_size == 18


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    for step in (2, 9, 10, 100):
        store.save(step, learner(step), {})
    assert steps_in(tmp_path) == ["step_000010", "step_000100"]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    store.save(1, learner(5), {"x": 1})
    store.save(1, learner(6), {"x": 2})
    found = store.latest(print)
    assert found is not None
    assert found[1]["x"] == 2
    assert steps_in(Path(found[0])) == ["weights_6"]


def test_a_kill_between_write_and_rename_leaves_the_previous(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    store.save(1, learner(1), {})
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", dies)
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)  # a killed process tidies nothing up
        with pytest.raises(Killed):
            store.save(2, learner(2), {})
    assert (tmp_path / "step_000002.part" / "state.json").exists()
    found = CheckpointStore(tmp_path, keep=1).latest(print)
    assert found is not None
    assert found[1]["step"] == 1
    store.save(2, learner(2), {})  # the resumed run comes by again
    assert steps_in(tmp_path) == ["step_000002"]
    (tmp_path / "step_000003.part").mkdir()
    store.clean()
    assert steps_in(tmp_path) == ["step_000002"]


@given(st.lists(st.sampled_from(["saved", "learner dies", "state dies"]), max_size=6), st.integers(1, 3))
@settings(deadline=None, max_examples=40)
def test_any_history_of_kills(history: list[str], keep: int) -> None:
    with TemporaryDirectory() as folder:
        saved: list[int] = []
        for step, fate in enumerate(history, start=1):
            store = CheckpointStore(Path(folder), keep)
            if fate == "saved":
                store.save(step, learner(step), {})
                saved.append(step)
            elif fate == "learner dies":
                with pytest.raises(Killed):
                    store.save(step, dies, {})
            else:
                with pytest.raises(TypeError):
                    store.save(step, learner(step), {"x": object()})  # half of state.json is written
        found = CheckpointStore(Path(folder), keep).latest(print)
        assert (found and found[1]["step"]) == (saved[-1] if saved else None)
        whole = [path for path in Path(folder).iterdir() if path.suffix != ".part"]
        assert sorted(path.name for path in whole) == [f"step_{step:06d}" for step in saved[-keep:]]


def full(_: str) -> None:
    raise OSError(ENOSPC, "No space left on device")


def test_a_full_disk_costs_the_checkpoint_alone(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    store.save(1, learner(1), {})
    with pytest.raises(
        QarlError, match=r"step_000002: cannot be written: .*No space left on device; make room"
    ) as caught:
        store.save(2, full, {})
    assert caught.value.exit_code == 1
    assert steps_in(tmp_path) == ["step_000001"]


def test_a_checkpoint_is_on_the_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    rename = Path.rename

    def renamed(path: Path, target: Path) -> Path:
        synced.append("rename")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", lambda opened: synced.append(Path(f"/proc/self/fd/{opened}").resolve().name))
    monkeypatch.setattr(Path, "rename", renamed)
    CheckpointStore(tmp_path, keep=1).save(2, learner(2), {})
    before, after = synced[: synced.index("rename")], synced[synced.index("rename") :]
    assert sorted(before) == ["learner", "manifest.json", "state.json", "step_000002.part", "weights_2"]
    assert after == ["rename", tmp_path.name]


@pytest.mark.parametrize(("number", "saved"), [(EINVAL, True), (EIO, False)])
def test_a_file_system_that_syncs_no_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, saved: bool
) -> None:
    def sync(opened: int) -> None:
        if Path(f"/proc/self/fd/{opened}").is_dir():
            raise OSError(number, "refused")

    monkeypatch.setattr(os, "fsync", sync)
    store = CheckpointStore(tmp_path, keep=1)
    with nullcontext() if saved else pytest.raises(QarlError, match="cannot be written"):
        store.save(2, learner(2), {})
    assert (store.latest(print) is not None) == saved


DAMAGES: dict[str, Callable[[Path], object]] = {
    "flipped": lambda folder: _flip(folder / "learner" / "weights_20"),
    "truncated": lambda folder: os.truncate(folder / "learner" / "weights_20", 3),
    "missing": lambda folder: (folder / "learner" / "weights_20").unlink(),
    "one too many": lambda folder: (folder / "learner" / "weights_21").touch(),
    "a state of another step": lambda folder: folder.rename(folder.with_name("step_000021")),
    "an edited state": lambda folder: (folder / "state.json").write_text(
        json.dumps({"schema": SCHEMA, "step": 20, "x": 1})
    ),
    "no state": lambda folder: (folder / "state.json").unlink(),
    "no manifest": lambda folder: (folder / MANIFEST).unlink(),
    **{
        f"the state {content[:20]!r}": lambda folder, content=content: (folder / "state.json").write_bytes(content)
        for content in (b"", b"{", b'{"schema": 2', b"[]", b"[1]", b"3", b"null", b"\xff", b"[" * 99_999)
    },
    "another version": lambda folder: (folder / "state.json").write_text(json.dumps({"schema": 1, "step": 20})),
}


def _flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[11] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_what_has_changed_is_not_used(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    """The checkpoint before is, and that is told; the next one replaces what is damaged."""
    store, said = CheckpointStore(tmp_path, keep=2), list[str]()
    for step in (10, 20):
        store.save(step, learner(step), {})
    damage(tmp_path / "step_000020")
    found = store.latest(said.append)
    assert found is not None
    assert found[1]["step"] == 10
    [line] = said
    assert line.startswith(f"{tmp_path}/step_0000")
    assert line.endswith("; going back to the checkpoint of step 10")
    store.save(15, learner(15), {})
    assert steps_in(tmp_path) == ["step_000010", "step_000015"]
    assert store.latest(said.append) is not None
    assert said == [line]


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_without_another_checkpoint_damage_is_an_error(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    store.save(20, learner(20), {})
    damage(tmp_path / "step_000020")
    with pytest.raises(CheckpointError, match="; no other checkpoint is whole: start over") as caught:
        store.latest(print)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_folder_that_is_called_like_no_checkpoint_is_refused(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    store.save(20, learner(20), {})
    (tmp_path / "step_old").mkdir()
    with pytest.raises(CheckpointError, match="step_old: is called like no checkpoint; move it elsewhere"):
        store.latest(print)


def test_steps_are_ordered_as_numbers(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    for step in (999_999, 1_000_000):
        store.save(step, learner(1), {})
    found = store.latest(print)
    assert found is not None
    assert found[1]["step"] == 1_000_000

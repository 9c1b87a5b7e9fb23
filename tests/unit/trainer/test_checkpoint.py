"""Checkpoints are whole or absent."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qarl.errors import CheckpointError
from tests.support.fakes import Killed
from trainer.checkpoint import SCHEMA, CheckpointStore


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
    assert CheckpointStore(tmp_path / "none", keep=2).latest() is None


def test_latest_is_what_was_saved(tmp_path: Path) -> None:
    CheckpointStore(tmp_path, keep=2).save(18, learner(18), {"pool": {"rng": [1, 2]}})
    found = CheckpointStore(tmp_path, keep=2).latest()
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
    found = store.latest()
    assert found is not None
    assert found[1]["x"] == 2
    assert steps_in(Path(found[0])) == ["weights_6"]


def test_a_kill_between_write_and_rename_leaves_the_previous(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    store.save(1, learner(1), {})
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", dies)
        with pytest.raises(Killed):
            store.save(2, learner(2), {})
    assert (tmp_path / "step_000002.part" / "state.json").exists()
    found = CheckpointStore(tmp_path, keep=1).latest()
    assert found is not None
    assert found[1]["step"] == 1
    store.save(2, learner(2), {})  # the resumed run comes by again
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
        found = CheckpointStore(Path(folder), keep).latest()
        assert (found and found[1]["step"]) == (saved[-1] if saved else None)
        whole = [path for path in Path(folder).iterdir() if path.suffix != ".part"]
        assert sorted(path.name for path in whole) == [f"step_{step:06d}" for step in saved[-keep:]]


@pytest.mark.parametrize("content", ["", "{", '{"schema": 1', "[]", "[1]", "3", "null", "\udcff", None])
def test_damaged_state(tmp_path: Path, content: str | None) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    store.save(1, learner(1), {})
    file = tmp_path / "step_000001" / "state.json"
    if content is None:
        file.unlink()
    else:
        file.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(CheckpointError) as caught:
        store.latest()
    assert caught.value.where == str(file)
    assert "\n" not in str(caught.value)


def test_a_state_without_a_step(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    store.save(1, learner(1), {})
    (tmp_path / "step_000001" / "state.json").write_text(json.dumps({"schema": SCHEMA}))
    with pytest.raises(CheckpointError, match="tells no step; delete the folder"):
        store.latest()


def test_another_schema(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    store.save(1, learner(1), {})
    (tmp_path / "step_000001" / "state.json").write_text(json.dumps({"schema": SCHEMA + 1, "step": 1}))
    with pytest.raises(CheckpointError, match=f"schema {SCHEMA + 1}, this version reads {SCHEMA}"):
        store.latest()

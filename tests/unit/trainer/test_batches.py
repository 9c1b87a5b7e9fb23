"""Batches as files: equal in every bit, and trained on again among fakes."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qarl.config.io import validate
from qarl.errors import ConfigError, DataError
from qarl.types import TrainSequence
from tests.support.fakes import FakeLearner
from tests.support.runs import Run, make_config
from trainer.batches import batch_file, load_batch, save_batch, train_from

FLOATS = st.floats(width=32)


@st.composite
def sequences(draw: st.DrawFn) -> TrainSequence:
    ids = st.lists(st.integers(0, 200_000), max_size=4).map(tuple)
    response = draw(ids)
    n = len(response)

    def array(values: st.SearchStrategy[object], dtype: type) -> np.ndarray:
        return np.array(draw(st.lists(values, min_size=n, max_size=n)), dtype=dtype)

    return TrainSequence(
        draw(ids),
        response,
        array(FLOATS, np.float32),
        draw(st.floats(allow_nan=False)),
        draw(st.sampled_from([None, array(FLOATS, np.float32)])),
        draw(st.sampled_from([None, array(st.booleans(), np.bool_)])),
        draw(st.integers(-1, 9)),
        draw(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=5)),
        draw(st.sampled_from([None, array(st.booleans(), np.bool_)])),
        draw(st.sampled_from([None, array(st.integers(0, 9), np.int64)])),
    )


def same(one: TrainSequence, other: TrainSequence) -> bool:
    for field in fields(TrainSequence):
        a, b = getattr(one, field.name), getattr(other, field.name)
        assert type(a) is type(b)
        if isinstance(a, np.ndarray):
            assert (a.dtype, a.tobytes()) == (b.dtype, b.tobytes())
        else:
            assert a == b
    return True


@given(st.lists(st.lists(sequences(), min_size=1, max_size=3), max_size=3))
def test_a_batch_comes_back_equal_in_every_bit(
    tmp_path_factory: pytest.TempPathFactory, minibatches: list[list[TrainSequence]]
) -> None:
    file = batch_file(tmp_path_factory.mktemp("batches") / "new", 7)
    save_batch(file, minibatches)
    loaded = load_batch(file)
    assert [len(minibatch) for minibatch in loaded] == [len(minibatch) for minibatch in minibatches]
    assert all(
        same(a, b) for ours, theirs in zip(loaded, minibatches, strict=True) for a, b in zip(ours, theirs, strict=True)
    )


def test_training_on_saved_batches_is_the_same_training(tmp_path: Path) -> None:
    config = make_config(debug={"save_batches": True})
    run = Run(tmp_path / "checkpoints", config, batches=tmp_path / "batches")
    run.trainer.run()
    learner = FakeLearner()
    rows = list(train_from(tmp_path / "batches", config, learner))
    assert learner.theta == run.learner.theta != 0.0
    assert [step for step, _, _ in rows] == run.steps("actor/updates") == [1, 2, 3, 4]
    original = {step: metrics for step, metrics in run.tracker.rows if "actor/updates" in metrics}
    assert all(metrics.items() <= original[step].items() for step, _, metrics in rows)
    trained = [[len(s.response_ids) for part in step for s in part] for step in run.learner.minibatches]
    assert [lengths for _, lengths, _ in rows] == trained


def test_rollout_only_never_updates(tmp_path: Path) -> None:
    run = Run(tmp_path, make_config(debug={"rollout_only": True}))
    run.trainer.run()
    assert (run.learner.theta, run.learner.minibatches) == (0.0, [])
    assert len(run.values("reward/mean")) == 4
    assert set(run.values("mismatch/logp_abs_max")) == {0.0}


def test_what_is_no_batch_is_a_data_error(tmp_path: Path) -> None:
    file = tmp_path / "step-1.npz"
    for content in (None, b"", b"PK\3\4 no zip", b"\x93NUMPY"):
        if content is not None:
            file.write_bytes(content)
        with pytest.raises(DataError, match=r"step-1\.npz: no batch that"):
            load_batch(file)
    np.savez(file, ids=np.array([1]))
    with pytest.raises(DataError, match="no batch that"):
        load_batch(file)
    np.savez(file, sizes=np.array([None], dtype=object))  # a pickle
    with pytest.raises(DataError, match="no batch that"):
        load_batch(file)


@pytest.mark.parametrize(
    ("debug", "message"),
    [
        ({"train_from": "other/batches", "rollout_only": True}, "samples nothing"),
        ({"train_from": "runs/run/batches"}, r"choose another run\.name"),
        ({"profile_steps": [3, 2]}, "ends before it begins"),
        ({"profile_steps": [3]}, "profile_steps"),
    ],
)
def test_switches_that_contradict_each_other(debug: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate({"model": {"path": "m"}, "task": {"kind": "sorting"}, "debug": debug}, "test")

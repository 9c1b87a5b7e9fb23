"""Times of a model from one and two of its layers."""

from collections.abc import Callable
from typing import Any

import pytest

from launch.tools.plan import timing
from launch.tools.plan.speed import Load
from launch.tools.plan.timing import ModelTimes, time_model
from qarl.config.derived import choose_counts
from qarl.config.io import validate
from qarl.errors import QarlError
from qarl.quant.scheme import QuantScheme
from tests.support.numerics_models import tiny_model

LOAD = Load(samples=8, prompt_tokens=5, response_tokens=6, longest=8, workers=1, ranks=1, minibatches=2)
CONFIG: dict[str, Any] = {
    "model": {"path": "none", "dtype": "float32"},
    "task": {"kind": "sorting"},
    "train": {"prompts_per_step": 4, "group_size": 2},
    "learner": {"minibatches": 2, "num_threads": 2, "numerics": "portable"},
}


def with_seconds(monkeypatch: pytest.MonkeyPatch, seconds: Callable[[int], list[float]]) -> Any:
    """Let the parts of a model of n layers take `seconds(n)`; returns the config of a model of 30 layers."""
    monkeypatch.setattr(timing, "_parts", lambda config, model, layers, *rest: seconds(layers))
    monkeypatch.setattr(timing, "_seconds", lambda part: part)
    model = tiny_model("qwen3").config
    model.num_hidden_layers = 30
    return model


def test_layers_cost_what_the_timed_ones_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_seconds(monkeypatch, lambda layers: [1.0 + layers, 2.0, 3.0 * layers, 4.0])
    config = choose_counts(validate(CONFIG, "test"), "cpu", 2)
    for layer in (timing.TIMED, timing.TIMED // 7, 1):  # 2, 7 and all layers are timed
        assert time_model(config, model, layer, QuantScheme(), LOAD, 4) == ModelTimes(31.0, 2.0, 2 * 90.0, 2 * 4.0)


def test_a_layer_that_takes_less_than_no_time_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_seconds(monkeypatch, lambda layers: [1.0, 1.0, 1.0, 3.0 - layers])
    config = choose_counts(validate(CONFIG, "test"), "cpu", 2)
    with pytest.raises(QarlError, match="2 layers took less time than one"):
        time_model(config, model, timing.TIMED, QuantScheme(), LOAD, 4)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "qwen3_moe"])
def test_every_part_of_a_step_takes_time(kind: str) -> None:
    config, model = choose_counts(validate(CONFIG, "test"), "cpu", 2), tiny_model(kind).config
    parts = timing._parts(config, model, 1, QuantScheme("none"), LOAD, slots=4)
    assert len(parts) == 4
    assert all(timing._seconds(part) > 0 for part in parts)

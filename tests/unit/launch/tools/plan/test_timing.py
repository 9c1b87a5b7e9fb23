"""Times of a model from one and two of its layers."""

from typing import Any

import pytest

from launch.tools.plan import timing
from launch.tools.plan.speed import Load
from launch.tools.plan.timing import ModelTimes, time_model
from qarl.config.derived import choose_counts
from qarl.config.io import validate
from qarl.quant.scheme import QuantScheme
from tests.support.numerics_models import tiny_model

LOAD = Load(samples=8, prompt_tokens=5, response_tokens=6, longest=8, workers=1, ranks=1, minibatches=2)
CONFIG: dict[str, Any] = {
    "model": {"path": "none", "dtype": "float32"},
    "task": {"kind": "sorting"},
    "train": {"prompts_per_step": 4, "group_size": 2},
    "learner": {"minibatches": 2, "num_threads": 2, "numerics": "portable"},
}


def test_layers_beyond_the_second_cost_what_the_second_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        timing, "_times", lambda config, model, layers, *rest: [1.0 + layers, 2.0, 3.0 * layers, 9 - layers]
    )
    model = tiny_model("qwen3").config
    model.num_hidden_layers = 30
    config = choose_counts(validate(CONFIG, "test"), "cpu", 2)
    assert time_model(config, model, QuantScheme(), LOAD, 4) == ModelTimes(
        31.0, 2.0, 90.0, 0.0
    )  # noise: none is below 0


@pytest.mark.parametrize("kind", ["llama", "qwen3", "qwen3_moe"])
def test_every_part_of_a_step_takes_time(kind: str) -> None:
    config, model = choose_counts(validate(CONFIG, "test"), "cpu", 2), tiny_model(kind).config
    times = timing._times(config, model, 1, QuantScheme("none"), LOAD, slots=4)
    assert all(seconds > 0 for seconds in times)

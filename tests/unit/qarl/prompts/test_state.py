"""A saved state comes back complete, or is refused."""

from __future__ import annotations

import base64
import math
from array import array
from typing import Any

import pytest

from qarl.config.pool import ArchiveConfig, PoolConfig
from qarl.errors import CheckpointError
from qarl.prompts.pool import Pool
from qarl.prompts.state import COLUMNS, parse
from qarl.prompts.state import row as saved_row
from qarl.types import GroupResult, Prompt
from tests.support.pool import prompts, through_json


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 0}, "version 0"),
        ({"version": 1}, "version 1, this qarl reads 2; resume with the qarl that wrote it"),
        ({"ids": []}, "4 prompt ids"),
        ({"ids": ["p0", "p1", "p2", "p3", "p3"]}, "damaged"),
        ({"columns": {"ticket": "AAAA"}}, "damaged"),
        ({"columns": {}}, "damaged"),
        ({"grown": [{"id": "p9"}]}, "damaged"),
        ({"gauges": {"no": 1}}, "damaged"),
        ({"archive": {"p0": {"row": {}, "step": 0}}}, "damaged"),
        ({"lineage": [["p0", "p1", 1.0], ["p1", "p0", 1.0]]}, "cycle"),
        ({"lineage": [["p0", "p9", 1.0]]}, "contradict"),
        ({"rng": [1, 2]}, "damaged"),
        ({"rng": [-1] * 625}, "damaged"),
        ({"grown": [{"id": "p9", "text": 5, "answer": "", "token_ids": []}]}, "is not a prompt"),
        ({"grown": [{"id": "p9", "text": "", "answer": "", "token_ids": "abc"}]}, "is not a prompt"),
        ({"cooling": None}, "damaged"),
        ({"cooling": ["p0"], "in_flight": ["p0"]}, "two states"),
        ({"cooling": ["p9"]}, "unknown"),
        ({"gauges": {"arrivals": "4"}}, "damaged .*arrivals .*'4'"),
        ({"gauges": {"arrivals": 2**63}}, "damaged .*arrivals .*=9"),
        ({"gauges": {"clock": math.inf}}, "damaged .*clock .*=inf"),
        ({"gauges": {"clock": -1.0}}, "damaged .*clock .*=-1"),
        ({"gauges": {"refresh_step": -2}}, "damaged .*refresh_step .*=-2"),
    ],
)
def test_foreign_states_are_refused_and_the_pool_stays(change: dict[str, Any], message: str) -> None:
    pool = Pool(prompts(4), PoolConfig(), seed=0)
    pool.draw(2, 0)
    before = pool.state_dict()
    with pytest.raises(CheckpointError, match=message):
        pool.load_state_dict({**through_json(pool), **change})
    assert pool.state_dict() == before


@pytest.mark.parametrize(
    ("column", "value"),
    [
        *(("ticket", v) for v in (math.nan, -0.1, 1.0)),
        *(("successes", v) for v in (math.nan, -0.1, 2.5)),
        *(("trials", v) for v in (math.nan, math.inf, 0.0)),
        *(("estimate", v) for v in (-0.1, 1.1, math.inf)),
        *(("alarm_base", v) for v in (math.nan, math.inf, -1.0)),
        ("arrival", -1),
        *(("visits", v) for v in (-1, 0)),
        ("last_step", -1),
    ],
)
def test_statistics_that_cannot_be_are_refused(column: str, value: float) -> None:
    """In the pool as in its archive; the prompt is named."""
    pool = Pool(prompts(4), PoolConfig(capacity=4, archive=ArchiveConfig(capacity=2)), seed=0)
    pool.observe([GroupResult(f"p{i}", (1.0, 0.0)) for i in range(4) if pool.draw(1, 0)], 0)
    pool.observe([GroupResult(f"p{i}", (1.0, 0.0)) for i in range(4)], 0)
    pool.add(Prompt("new", "", "", ()), "p1")
    state = through_json(pool)
    values = array(COLUMNS[column])
    values.frombytes(base64.b64decode(state["columns"][column]))
    values[2] = type(values[2])(value)
    damaged = {**state["columns"], column: base64.b64encode(values.tobytes()).decode()}
    with pytest.raises(CheckpointError, match=f"damaged .*'{state['ids'][2]}' has impossible statistics"):
        pool.load_state_dict({**state, "columns": damaged})
    row = saved_row(pool._records["p2"]) | {column: value}
    with pytest.raises(CheckpointError, match=r"damaged .*'p9' has impossible"):
        parse({**state, "archive": {"p9": {"row": row, "step": 0}}}, [*prompts(4), Prompt("p9", "", "", ())])


@pytest.mark.parametrize(("column", "value"), [("arrival", 1.5), ("visits", 10**30), ("ticket", "0")])
def test_an_archived_prompt_has_values_of_the_columns_kinds(column: str, value: Any) -> None:
    """They go into the columns when the prompt comes back, many steps later."""
    pool = Pool(prompts(4), PoolConfig(capacity=4, archive=ArchiveConfig(capacity=2)), seed=0)
    row = saved_row(pool._records["p2"]) | {column: value}
    state = {**through_json(pool), "archive": {"p9": {"row": row, "step": 0}}}
    with pytest.raises(CheckpointError, match="damaged"):
        parse(state, [*prompts(4), Prompt("p9", "", "", ())])


@pytest.mark.parametrize("state", [[1], None, "{}", 3])
def test_what_is_no_state_is_refused(state: Any) -> None:
    with pytest.raises(CheckpointError, match="version None, this qarl reads 2"):
        Pool(prompts(4), PoolConfig(), seed=0).load_state_dict(state)


def test_state_of_another_data_set_is_refused() -> None:
    state = Pool(prompts(5), PoolConfig(), seed=0).state_dict()
    with pytest.raises(CheckpointError, match="1 prompt ids are not in both the state and the task, first 'p4'"):
        Pool(prompts(4), PoolConfig(), seed=0).load_state_dict(state)


def test_a_truncated_state_is_refused() -> None:
    pool = Pool(prompts(4), PoolConfig(), seed=0)
    state = through_json(pool)
    for key in state:
        with pytest.raises(CheckpointError):
            pool.load_state_dict({name: value for name, value in state.items() if name != key})


def test_grown_prompts_come_back_whole() -> None:
    config = PoolConfig(capacity=3, archive=ArchiveConfig(capacity=2))
    pool, other = (Pool(prompts(2), config, seed=0) for _ in range(2))
    assert pool.add(Prompt("new", "2+2?", "4", (5, 6), level=7), parent_id="p0")
    other.load_state_dict(through_json(pool))
    assert Prompt("new", "2+2?", "4", (5, 6), level=7) in other.draw(3, 1)

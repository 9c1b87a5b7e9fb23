"""Prompts, pools and forests for tests."""

from __future__ import annotations

import json
from typing import Any, Literal

from hypothesis import strategies as st

from qarl.config.pool import ArchiveConfig, LineageConfig, PoolConfig, RetireConfig
from qarl.prompts.lineage import Forest
from qarl.prompts.pool import Pool
from qarl.types import Prompt

Mode = Literal["children", "path"]
MODES: list[Mode] = ["children", "path"]
Links = list[tuple[str, str, float]]
Strategy = Literal["frontier", "uniform", "median", "prioritised", "easy_to_hard"]
STRATEGIES: list[Strategy] = ["frontier", "uniform", "median", "prioritised", "easy_to_hard"]


@st.composite
def configs(draw: st.DrawFn, size: int) -> PoolConfig:
    capacity = draw(st.none() | st.integers(size, size + 3))
    target = draw(st.sampled_from([0.0, 0.3, 0.5, 1.0]))
    archived = draw(st.integers(0, 3)) if capacity else 0
    return PoolConfig(
        strategy=draw(st.sampled_from(STRATEGIES)),
        target=target,
        exploration=draw(st.sampled_from([0.0, 0.4, 1.0])),
        cooldown_steps=draw(st.integers(0, 3)),
        decay=draw(st.sampled_from([0.0, 0.7, 1.0])),
        stale_after_steps=draw(st.sampled_from([1, 3, 6])),
        reach=draw(st.sampled_from([0.0, 0.2, 1.0])),
        capacity=capacity,
        retire=RetireConfig(
            after_visits=draw(st.integers(0, 2)),
            solved_above=max(target, draw(st.sampled_from([0.7, 1.0]))),
            hopeless_below=min(target, draw(st.sampled_from([0.0, 0.2]))),
            recheck_after_steps=draw(st.integers(1, 5)),
        ),
        lineage=LineageConfig(refresh_every=draw(st.integers(0, 3)), aggregate=draw(st.sampled_from(MODES))),
        archive=ArchiveConfig(
            capacity=archived,
            reinsert_per_step=draw(st.integers(0, 2)) if archived else 0,
            rest_steps=draw(st.integers(1, 3)),
        ),
    )


def prompts(n: int) -> list[Prompt]:
    return [Prompt(f"p{i}", "", "", (), level=i % 3) for i in range(n)]


def ids(drawn: list[Prompt]) -> list[str]:
    return [prompt.id for prompt in drawn]


def through_json(pool: Pool) -> Any:
    return json.loads(json.dumps(pool.state_dict(), allow_nan=False))


def make_forest(links: Links) -> Forest:
    made = Forest()
    for link in links:
        made.link(*link)
    return made

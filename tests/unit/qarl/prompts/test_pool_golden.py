"""The default pool's draws, pinned: the hashes come from the first pool of this repository, which sorted nothing out
by capacity, retirement or lineage. Whatever was added since must leave them as they are."""

from __future__ import annotations

import hashlib
import random
from typing import Literal

import pytest

from qarl.config.pool import PoolConfig
from qarl.prompts.pool import Pool
from qarl.seeds import derive_seed
from qarl.types import GroupResult, Prompt

STEPS, PER_STEP, GROUP = 80, 32, 8
GOLDEN: dict[tuple[Literal["frontier", "uniform"], int], str] = {
    ("frontier", 0): "1223cc34527f1864",
    ("frontier", 1): "57504b6aeb74cd14",
    ("frontier", 2): "01d5739d22f508e1",
    ("uniform", 0): "80a0a78824546f14",
    ("uniform", 1): "a8c98eddf7f771d3",
    ("uniform", 2): "abfc03f319f375a9",
}


def draws(strategy: Literal["frontier", "uniform"], seed: int) -> str:
    """Hash of all ids drawn in a run of the quickstart's size: 2048 prompts of mixed difficulty, some draws aborted."""
    rng = random.Random(seed)
    prompts = [Prompt(f"sorting/{i}", "", "", ()) for i in range(2048)]
    chance = {prompt.id: rng.choice([0.0, 0.0, 0.1, 0.4, 0.6, 0.9, 1.0]) for prompt in prompts}
    pool = Pool(prompts, PoolConfig(strategy=strategy), derive_seed(seed, "pool"))
    digest = hashlib.sha256()
    for step in range(1, STEPS + 1):
        drawn = [prompt.id for prompt in pool.draw(PER_STEP, step)]
        digest.update(" ".join(drawn).encode())
        if step % 7 == 0:
            pool.abort(drawn[::5])
        groups = [GroupResult(i, tuple(float(rng.random() < chance[i]) for _ in range(GROUP))) for i in drawn]
        pool.observe(groups, step)
    return digest.hexdigest()[:16]


@pytest.mark.parametrize(("strategy", "seed"), GOLDEN)
def test_default_draws_are_those_of_the_first_pool(strategy: Literal["frontier", "uniform"], seed: int) -> None:
    assert draws(strategy, seed) == GOLDEN[strategy, seed]

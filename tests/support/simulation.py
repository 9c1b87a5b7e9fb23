"""Simulated runs whose speed is known in closed form."""

from __future__ import annotations

from typing import Any

from launch.tools.simulate.rates import Rates
from qarl.config.run import Config
from tests.support.runs import make_config

PROMPTS, GROUP, LENGTH = 4, 8, 10
RESPONSES = PROMPTS * GROUP


def rates(**changes: Any) -> Rates:
    """Engines and learner take next to no time but for what is said; all responses have `LENGTH` tokens."""
    free: dict[str, Any] = {
        "slots": 1000,
        "decode_s": lambda batch: 1e-6,
        "lengths": [LENGTH],
        **dict.fromkeys(
            ("prefill_s", "score_s", "unaligned_s", "update_s", "optimizer_s", "exchange_s", "publish_s", "driver_s"),
            0.0,
        ),
    }
    return Rates(**free | changes)


def config(max_staleness: int = 0, workers: int = 1, ranks: int = 1, **sections: dict[str, Any]) -> Config:
    train = {"prompts_per_step": PROMPTS, "group_size": GROUP, "max_staleness": max_staleness}
    tree: dict[str, dict[str, Any]] = {
        "train": train | sections.pop("train", {}),
        "rollout": {
            "num_workers": workers,
            "max_num_seqs": 1000,
            "sampling": {"max_new_tokens": 64},
        }
        | sections.pop("rollout", {}),
        "learner": {"num_ranks": ranks, "minibatches": 2},
        "advantage": {"drop_zero_variance": False},
    }
    return make_config(**tree | sections)

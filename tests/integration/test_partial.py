"""A whole run whose responses are interrupted by new weights: `pytest -m slow tests/integration/test_partial.py`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.small_run import train

pytestmark = pytest.mark.slow
INTERRUPTED = """
run: {name: partial}
rollout: {partial: true, max_model_len: 512, max_num_seqs: 8, sampling: {max_new_tokens: 400}, stragglers: {kind: keep}}
reward: {kind: custom, function: "tests.support.rewards:share_of_digits"}
mismatch: {stale_share: 1.0}
"""
MORE = ("train.max_staleness=3", "train.steps=6", "train.checkpoint_every=6", "learner.optimizer.lr=1.0e-3")


def test_every_version_of_an_interrupted_response_is_compared_and_exact(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    done = train(tmp_path, tiny_models["qwen3"], INTERRUPTED, *MORE)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "runs" / "partial" / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "reward/mean" in row]
    assert len(steps) == 6
    assert sum(row["staleness/continued"] for row in steps) > 0
    assert max(row["staleness/segments"] for row in steps) > 16  # more than there are responses
    assert sum(row["mismatch/stale_compared"] for row in steps) > 0
    assert max(row["staleness/k3_kl"] for row in steps) > 0.0  # the weights do move
    for row in rows:
        assert row.get("mismatch/logp_abs_max", 0.0) == row.get("mismatch/probe_logp_abs_max", 0.0) == 0.0

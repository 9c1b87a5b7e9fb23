from pathlib import Path

import pytest

from launch.run.metric_table import OTHER, describe, overall_figures, page, rows, section_of
from tests.support.fakes import FakeEngine
from tests.support.runs import AUGMENT, Run, make_config

DOCS = Path(__file__).parents[4] / "docs"


def test_every_metric_of_a_run_is_in_the_table(tmp_path: Path) -> None:
    sections = {"mismatch": {"unaligned_every": 1}, "pool": {"augment": AUGMENT}, "train": {"dynamic_sampling": 1}}
    run = Run(tmp_path, make_config(**sections), engines=[FakeEngine(0, drift=0.1)], exact=False)
    run.trainer.run()
    names = {name for _, metrics in run.tracker.rows for name in metrics} - {"actor/updates"}  # the fake learner's own
    assert len(names) > 100
    assert {name for name in names if section_of(name) == OTHER} == set()


def test_the_row_that_comes_first_describes_a_metric() -> None:
    assert describe("eval/pass@1").text.startswith("right samples")  # type: ignore[union-attr]
    assert describe("eval/pass@4").text.startswith("held-out prompts with")  # type: ignore[union-attr]
    assert describe("mismatch/q2_k3_kl").section == "mismatch"  # type: ignore[union-attr]
    assert describe("mine/own") is None
    assert section_of("mine/own") == OTHER
    names = [row.name for row in rows()]
    assert len(names) == len(set(names))


def test_docs_have_the_table() -> None:
    if (DOCS / "metrics.md").read_text() != page():
        pytest.fail("docs/metrics.md is old: python -m launch.run.metric_table > docs/metrics.md")


def test_the_number_of_prompts_is_no_figure_of_the_policy() -> None:
    names = ["eval/pass@1", "eval/num_prompts", "eval/level_02/pass@1", "eval/greedy", "reward/mean"]
    assert overall_figures(names) == ["eval/pass@1", "eval/greedy"]

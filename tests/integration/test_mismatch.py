"""`qarl mismatch` with the real engine: nothing is left under the engine's numerics, and every switch shows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from launch.cli import main
from launch.run.gaps import Cell, Gap
from launch.tools.mismatch.measure import PROFILES, Comparison, make_prompts, measure_length
from qarl.config.policy import RolloutConfig
from qarl.numerics import processor
from qarl.numerics.revert import RULES
from qarl.quant.publish import publish, write_engine_config
from qarl.quant.scheme import QuantScheme
from rollout.engine import VLLMEngine
from trainer.policy import Policy

LENGTH = 48


@pytest.fixture(scope="module")
def cell(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Cell:
    """With an engine of its own: an engine that failed to start elsewhere in this process took vLLM's groups along."""
    folder = tmp_path_factory.mktemp("engine")
    write_engine_config(folder, tiny_models["qwen3"], QuantScheme())
    engine = VLLMEngine(folder, RolloutConfig(max_model_len=768), QuantScheme(), "bfloat16", "cpu")
    asked = Comparison(str(tiny_models["qwen3"]), lengths=(LENGTH,), num_sequences=12, prompt_tokens=8, lr=1e-3)
    policy = Policy(asked.model, torch.bfloat16, QuantScheme(), "engine")
    engine.load(publish(policy.model, QuantScheme(), 0))
    return measure_length(engine, policy, asked, QuantScheme(), make_prompts(asked), LENGTH)


def gaps(cell: Cell, part: str) -> dict[str, Gap]:
    return {gap.name: gap for gap in cell.gaps if gap.part == part}


def test_every_response_has_its_length(cell: Cell) -> None:
    assert (cell.length, cell.sequences) == (LENGTH, 12)
    assert cell.kernels == ["CPUInt8ScaledMMLinearKernel"]
    assert cell.mean_logprob < 0


def test_the_learner_of_the_engines_numerics_has_no_gap(cell: Cell) -> None:
    found = gaps(cell, "learner")
    assert tuple(found) == PROFILES
    exact = found["engine"].metrics
    assert exact["logp_abs_max"] == exact["q4_logp_abs_max"] == 0.0
    assert exact["ess"] == exact["seq_ratio_min"] == exact["seq_ratio_max"] == 1.0
    assert found["unaligned"].mean > 1e-3
    assert found["stock"].mean > 1e-3
    if processor.has_vnni():  # elsewhere the engine's sums saturate, which no portable kernel follows
        assert found["portable"].mean < found["stock"].mean


def test_the_engine_agrees_with_itself_in_short_contexts(cell: Cell) -> None:
    assert {name: gap.max for name, gap in gaps(cell, "engine").items()} == {"prefill": 0.0, "batch of one": 0.0}


def test_every_switch_shows(cell: Cell) -> None:
    assert list(gaps(cell, "format")) == ["weight grid", "activation rounding", "kernel"]
    assert all(gaps(cell, "format")[name].mean > 1e-3 for name in ("weight grid", "activation rounding"))
    rounding = gaps(cell, "rounding")
    assert tuple(rounding) == ("linear", *RULES)
    if processor.has_vnni():
        assert rounding["linear"].max == 0.0  # integer sums are exact in any order
    else:
        assert rounding["linear"].mean > 1e-4
    assert all(rounding[rule].mean > 1e-4 for rule in RULES)
    [stale] = gaps(cell, "staleness").values()
    assert stale.mean > 1e-3


@pytest.mark.slow
def test_the_command(tiny_models: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A process for each format; without quantization, nothing to align and no format to take apart."""
    sizes = ["--lengths", "8", "20", "--num-sequences", "5"]
    formats = ["--scheme", "w8a8_int8", "none", "--out", str(tmp_path / "out")]
    newer = ["--stale-model", str(tiny_models["qwen3"])]
    assert main(["mismatch", str(tiny_models["qwen3"]), *sizes, *formats, *newer]) == 0
    cells = json.loads((tmp_path / "out" / "mismatch.json").read_text())
    assert [(c["scheme"], c["length"]) for c in cells] == [(s, n) for s in ("w8a8_int8", "none") for n in (8, 20)]
    parts = [[(gap["part"], gap["name"]) for gap in c["gaps"]] for c in cells]
    assert parts[2] == [p for p in parts[0] if p[0] != "format" and p[1] not in ("unaligned", "linear")]
    for c in cells:
        means = {(gap["part"], gap["name"]): gap["metrics"]["logp_abs_mean"] for gap in c["gaps"]}
        assert means["learner", "engine"] == means["staleness", "qwen3"] == 0.0
    printed = capfd.readouterr().out
    assert "| none" in printed
    assert "mismatch.png" in printed

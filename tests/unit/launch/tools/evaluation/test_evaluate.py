"""`qarl eval` around an engine that answers by the prompt: what is asked, judged, kept and continued."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launch.cli import main
from launch.demo.tiny_model import make_tokenizer
from launch.tools.evaluation import evaluate as module
from qarl.config.io import load_config, to_yaml
from qarl.config.run import Config
from qarl.config.shipped import config_path
from qarl.errors import RolloutError
from qarl.quant.scheme import QuantScheme
from qarl.types import Sample, SampleRequest
from tests.support.numerics_models import tiny_model
from trainer.evaluate import evaluate as evaluate_in_training

asked: list[SampleRequest] = []


class Engine:
    """Right for even seeds; with `dies_at`, it dies in that call."""

    dies_at = 0

    def __init__(self) -> None:
        self.calls = 0

    def sample(self, requests: Sequence[SampleRequest]) -> list[Sample]:
        self.calls += 1
        if self.calls == Engine.dies_at:
            raise RolloutError("the engine of none died")
        asked.extend(requests)
        texts = [r.prompt.answer if r.seed % 2 == 0 else "no" for r in requests]
        return [
            Sample(r.prompt, (5, 2), np.zeros(2, np.float32), text, "stop", 0)
            for r, text in zip(requests, texts, strict=True)
        ]


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished run of the quickstart with a random model."""
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs" / "quickstart"
    tiny_model("qwen3", head_dim=32).save_pretrained(run / "final")
    make_tokenizer(32).save_pretrained(run / "final")
    overrides = ["cluster.device=cpu", "eval.final_num_prompts=70", "rollout.scheme=none", "eval.greedy=false"]
    config = load_config(config_path("quickstart"), overrides)
    (run / "config.yaml").write_text(to_yaml(config))

    @contextmanager
    def engine(config: Config, scheme: QuantScheme, device: str) -> Iterator[Engine]:
        yield Engine()

    monkeypatch.setattr(module, "_engine", engine)
    monkeypatch.setattr(Engine, "dies_at", 0)
    asked.clear()
    return run


def read(out: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    rows = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    return json.loads((out / "results.json").read_text()), rows


def test_the_figures_are_those_of_the_training_loop(run_dir: Path) -> None:
    assert main(["eval", str(run_dir)]) == 0
    found, rows = read(run_dir / "eval")
    config = load_config(run_dir / "config.yaml", [f"model.path={run_dir}/final"])
    config = config.model_copy(update={"model": config.model.model_copy(update={"build": None})})
    ours, fleet = list(asked), Engine()
    asked.clear()
    _, _, heldout = module.load_prompts(config, lambda line: None)
    with module.closing(module.start_rewards(config, print, None)) as rewards:
        expected = evaluate_in_training(fleet, rewards, heldout[:70], config)
    assert ours == asked
    figures = found["schemes"]["none"]
    assert figures["pass@1"]["value"] == pytest.approx(expected["pass@1"])
    assert figures["pass@4"]["value"] == pytest.approx(expected["pass@4"])
    assert figures["level_02/pass@1"]["value"] == pytest.approx(expected["level_02/pass@1"])
    # All wrong samples have one answer here, so a vote of two is a coin where they differ.
    assert figures["maj@2"]["value"] == pytest.approx(figures["pass@1"]["value"], abs=0.02)
    assert 0 < figures["maj@4"]["value"] < figures["pass@4"]["value"]
    assert len(rows) == 280
    assert {row["reward"] for row in rows} == {row["success"] for row in rows} == {0.0, 1.0}


def test_a_killed_evaluation_continues(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Engine.dies_at = 2  # after 64 of 70 prompts
    assert main(["eval", str(run_dir)]) == 1
    assert "the engine of none died" in capsys.readouterr().err
    with (run_dir / "eval" / "samples.jsonl").open("a") as file:
        file.write('{"scheme": "none", "prom')  # as a kill leaves it
    Engine.dies_at = 0
    assert main(["eval", str(run_dir)]) == 0
    assert "none: 6 of 70 prompts to sample" in capsys.readouterr().out
    assert len(asked) == 280
    found, rows = read(run_dir / "eval")
    assert len({(row["prompt"], row["index"]) for row in rows}) == 280
    assert main(["eval", str(run_dir)]) == 0
    assert len(asked) == 280  # nothing is sampled twice
    assert read(run_dir / "eval") == (found, rows)


def test_schemes_side_by_side_on_the_same_samples(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--formats", "none", "fp8_channel", "--num-samples", "2", "--num-prompts", "8", "--temperature", "0.5"]
    assert main(["eval", str(run_dir), *options, "--top-p", "0.9", "--out", "both"]) == 0
    assert {(r.temperature, r.top_p, r.top_k) for r in asked} == {(0.5, 0.9, 0)}
    found, rows = read(Path("both"))
    assert found["paired"]["fp8_channel"] == {"against": "none", "value": 0.0, "low": 0.0, "high": 0.0, "p": 1.0}
    assert [row["scheme"] for row in rows] == ["none"] * 16 + ["fp8_channel"] * 16
    assert "fp8_channel against none, pass@1: +0.000" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (
            ["runs/quickstart", "--num-samples", "2"],
            "--out: runs/quickstart/eval holds an evaluation with other settings",
        ),
        (
            ["runs/quickstart", "--num-prompts", "4", "rollout.sampling.stop=[x]"],
            "holds an evaluation with other settings",
        ),
        (["runs/quickstart", "--max-new-tokens", "500"], "--max-new-tokens: 500 leaves no room for a prompt"),
        (["runs/quickstart", "--out", "runs/quickstart"], "--out: runs/quickstart holds something else"),
        (["unfinished"], "unfinished: the run has no final model; qarl export unfinished MODEL --format none"),
        (["quickstart", "--model", "nowhere"], "nowhere: no such model directory; give a Hugging Face model folder"),
        (["nothing"], "nothing"),
    ],
)
def test_bad_input(run_dir: Path, argv: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(run_dir), "--num-prompts", "4", "--out", "runs/quickstart/eval"]) == 0
    Path("unfinished").mkdir()
    (run_dir / "config.yaml").read_text()
    Path("unfinished/config.yaml").write_text((run_dir / "config.yaml").read_text())
    asked.clear()
    assert main(["eval", *argv]) == 2
    assert line in capsys.readouterr().err
    assert asked == []


@pytest.mark.parametrize(
    ("option", "says"),
    [
        (["--top-p", "7"], "'7' is not a number from 0.001 to 1"),
        (["--temperature", "-1"], "'-1' is not a number from 0 to 100"),
        (["--temperature", "nan"], "'nan' is not a number from 0 to 100"),
        (["--min-p", "half"], "'half' is not a number from 0 to 1"),
        (["--num-samples", "0"], "'0' is not a whole number from 1 to"),
    ],
)
def test_options_out_of_range(option: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["eval", "quickstart", *option])
    assert says in capsys.readouterr().err


def test_damaged_samples(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(run_dir), "--num-prompts", "4"]) == 0
    samples = run_dir / "eval" / "samples.jsonl"
    for text in (b"\xff\n", b"[]\n", samples.read_bytes().replace(b'"reward": ', b'"reward": "x", "r": ')):
        samples.write_bytes(text)
        assert main(["eval", str(run_dir), "--num-prompts", "4"]) == 2
        assert "samples.jsonl: is no file of samples: " in capsys.readouterr().err


def test_a_judge_that_cannot_work_is_told_before_the_engine(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked.clear()
    for setting, line in (
        ("reward.components=[{kind: http, settings: {url: 'http://127.0.0.1:1'}}]", "nobody answers at 127.0.0.1:1"),
        ("environment={kind: guess, settings: {guess: 3}}", "environment: cannot begin a conversation"),
    ):
        assert main(["eval", str(run_dir), setting, "--out", "new"]) == 2
        assert line in capsys.readouterr().err
    assert not Path("new").exists()
    assert asked == []


def test_a_damaged_settings_file(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run_dir / "eval").mkdir()
    (run_dir / "eval" / "settings.json").write_text("{")
    assert main(["eval", str(run_dir)]) == 2
    assert "settings.json: cannot be read: " in capsys.readouterr().err


def test_success_says_what_is_right_whatever_the_reward(run_dir: Path) -> None:
    overrides = ["reward.components=[{kind: exact, weight: 0.5}]", "--num-prompts", "6"]
    assert main(["eval", str(run_dir), *overrides]) == 0
    found, rows = read(run_dir / "eval")
    assert {(row["reward"], row["success"]) for row in rows} == {(0.0, 0.0), (0.5, 1.0)}
    figures = found["schemes"]["none"]
    assert figures["pass@1"]["value"] == pytest.approx(2 * figures["mean_reward"])

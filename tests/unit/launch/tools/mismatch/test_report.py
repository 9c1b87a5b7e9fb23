"""The report of `qarl mismatch`, its prompts, and the optimizer step that makes weights stale; no engine."""

from __future__ import annotations

import json
import math
import os
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock, patch

import numpy as np
import pytest
import torch
from rich.console import Console

from launch.cli import main
from launch.demo.tiny_model import make_tokenizer
from launch.run.gaps import Cell, Gap
from launch.tools.mismatch import measure as mismatch
from launch.tools.mismatch.measure import Comparison, _common, make_prompts, one_step, run, score
from launch.tools.mismatch.report import WIDTH, draw, render, write_report
from qarl.errors import ConfigError, DataError, KernelError, ModelError, QarlError, RolloutError
from qarl.mismatch import Mismatch
from qarl.quant.linear import quantized_linears
from qarl.quant.scheme import QuantScheme
from qarl.types import Prompt, Sample, TrainSequence
from trainer.policy import Policy

ROWS = [np.linspace(-3, -1, 8, dtype=np.float32), np.linspace(-2, -1, 5, dtype=np.float32)]


def gap(part: str, name: str, size: float) -> Gap:
    return Gap.between(part, name, [a + np.float32(size) for a in ROWS], ROWS)  # type: ignore[arg-type]


def make_cell(scheme: str, *gaps: Gap) -> Cell:
    return Cell("model", scheme, "bfloat16", ["Kernel"], 8, 2, -1.5, list(gaps))


CELLS = [
    make_cell(
        "w8a8_int8", gap("learner", "unaligned", 0.5), gap("learner", "engine", 0), gap("format", "kernel", 0.25)
    ),
    make_cell("none", gap("learner", "engine", 0), gap("rounding", "rope", 0.125)),
]


def test_a_gap_has_the_metrics_of_a_run() -> None:
    found = gap("learner", "stock", 0.5)
    whole = Mismatch.between([a + np.float32(0.5) for a in ROWS], ROWS, [0.001, 0.01, 0.1]).metrics("")
    assert found.metrics.items() >= whole.items()
    assert {f"q{number}_{name}" for number in (1, 2, 3, 4) for name in whole} == found.metrics.keys() - whole.keys()
    assert found.mean == 0.5


def printed(cells: list[Cell]) -> list[list[str]]:
    console = Console(width=WIDTH)
    with console.capture() as capture:
        console.print(render(cells))
    lines = [line for line in capture.get().splitlines() if line.strip()]
    assert all(line.startswith("|") and line.endswith("|") for line in lines)
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_tables_are_markdown() -> None:
    header, rule, quantized, plain, sources, _, kernel, rope = printed(CELLS)
    assert header == ["scheme", "dtype", "tokens", "unaligned", "engine"]
    assert all(set(cell) == {"-"} for cell in rule)
    assert quantized[:3] == ["w8a8_int8", "bfloat16", "8"]
    assert quantized[3:] == ["5.0e-01 (1.5e-01)", "exactly 0"]
    assert plain[3:] == ["-", "exactly 0"]  # without quantization there is nothing to align
    assert sources == ["part", "what differs", "w8a8_int8 bfloat16 8", "none bfloat16 8"]
    assert kernel == ["format", "kernel", "2.5e-01", "-"]
    assert rope == ["rounding", "rope", "-", "1.2e-01"]


def test_files_of_the_report(tmp_path: Path) -> None:
    write_report(tmp_path / "new" / "folder", CELLS)
    [first, second] = json.loads((tmp_path / "new" / "folder" / "mismatch.json").read_text())
    assert (first["scheme"], second["gaps"][1]["name"]) == ("w8a8_int8", "rope")
    assert first["gaps"][0]["metrics"]["logp_abs_mean"] == 0.5
    assert (tmp_path / "new" / "folder" / "mismatch.png").stat().st_size > 10_000


@pytest.mark.parametrize("sizes", [(0.0, 0.0), (math.nan, 1e-9), (math.inf, 1.0)])
def test_any_number_can_be_written_and_drawn(sizes: tuple[float, float], tmp_path: Path) -> None:
    cell = replace(CELLS[0], gaps=[gap("learner", "stock", sizes[0]), gap("rounding", "norm", sizes[1])])
    write_report(tmp_path, [cell])
    json.loads((tmp_path / "mismatch.json").read_text(), parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))


def test_bars_are_as_long_as_the_means() -> None:
    left = draw(CELLS[:1]).axes[0]
    ends = [bar.get_x() + bar.get_width() for bar in left.patches]  # type: ignore[attr-defined]
    floor = left.get_xlim()[0]
    assert ends == pytest.approx([0.5, floor, 0.25])
    assert [label.get_text() for label in left.get_yticklabels()] == ["unaligned", "engine", "kernel"]


# --- what is measured ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def asked(tiny_models: dict[str, Path]) -> Comparison:
    return Comparison(str(tiny_models["qwen3"]), lengths=(6,), num_sequences=5, prompt_tokens=4)


def test_random_prompts_are_plain_tokens(asked: Comparison) -> None:
    tokenizer = make_tokenizer(256)
    prompts = make_prompts(asked)
    assert [len(prompt.token_ids) for prompt in prompts] == [4] * 5
    assert len({prompt.token_ids for prompt in prompts}) == 5
    used = {tokenizer.convert_ids_to_tokens(token) for prompt in prompts for token in prompt.token_ids}
    assert used <= set("0123456789=")
    assert make_prompts(asked) == prompts
    assert make_prompts(replace(asked, seed=1)) != prompts


def test_prompts_from_a_file(asked: Comparison, tmp_path: Path) -> None:
    (tmp_path / "prompts").write_text("12=\n\n345=\n")
    encode = make_tokenizer(256).encode
    prompts = make_prompts(replace(asked, prompts=tmp_path / "prompts"))
    assert [list(prompt.token_ids) for prompt in prompts] == [encode(t) for t in ("12=", "345=", "12=", "345=", "12=")]


@pytest.mark.parametrize(
    ("content", "reason"), [(None, "cannot read"), (b"\n\n", "no lines"), (b"\xff\xfe", "not UTF-8 text")]
)
def test_prompts_that_cannot_be_used(asked: Comparison, tmp_path: Path, content: bytes | None, reason: str) -> None:
    if content is not None:
        (tmp_path / "prompts").write_bytes(content)
    with pytest.raises(DataError, match=reason):
        make_prompts(replace(asked, prompts=tmp_path / "prompts"))


def test_a_run_is_measured_as_it_sampled(
    tiny_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured = Mock(return_value=CELLS)
    monkeypatch.setattr(mismatch, "run", measured)
    (tmp_path / "final").symlink_to(tiny_models["qwen3"])
    (tmp_path / "config.yaml").write_text(
        "inherits: quickstart\nmodel: {dtype: float32}\n"
        "rollout: {scheme: w4a8, group_size: 32, ignore: [lm_head, 're:.*down.*']}\n"
    )
    summary = {"run": "mine", "scheme": "w4a8", "kernels": [], "steps": 7, "rollouts": 56, "train_seconds": 1.0}
    summary |= {"tokens_per_s": 9.0, "eval_before": {}, "eval_after": {}}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    assert main(["mismatch", str(tmp_path), "--num-sequences", "3"]) == 0
    assert "draws them, too" in capsys.readouterr().out
    comparison, out = measured.call_args.args
    assert (out, comparison.model, comparison.steps) == (tmp_path, str(tmp_path / "final"), 7)
    assert comparison.schemes == [QuantScheme("w4a8", ("lm_head", "re:.*down.*"), 32)]
    assert (comparison.dtypes, comparison.lengths, comparison.lr) == (["float32"], [14], 1e-4)
    prompts = make_prompts(replace(comparison, num_sequences=len(comparison.heldout) + 1))
    assert [prompt.token_ids for prompt in prompts[-2:]] == [
        comparison.heldout[-1].token_ids,
        comparison.heldout[0].token_ids,
    ]
    others = ["--scheme", "none", "--dtype", "bfloat16", "--lengths", "9", "--lr", "0", "--ignore", "--out", "other"]
    assert main(["mismatch", str(tmp_path), *others]) == 0
    comparison, out = measured.call_args.args
    assert (out, comparison.schemes) == (Path("other"), [QuantScheme("none", ())])
    assert (comparison.dtypes, comparison.lengths, comparison.lr) == (["bfloat16"], [9], 0.0)


def test_responses_that_do_not_fit_the_model(asked: Comparison, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="responses of 1100 tokens do not fit in the model's 1024"):
        run(replace(asked, lengths=(100, 1100)), tmp_path)


def test_a_folder_that_cannot_be_made_is_told_before_anything_is_measured(asked: Comparison, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        ModelError, match=r"file/out/mismatch\.json: cannot make its folder: Not a directory; name another folder$"
    ):
        run(asked, tmp_path / "file" / "out")


@pytest.mark.parametrize("model", ["nowhere", "empty"])
def test_a_model_that_is_none(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    assert main(["mismatch", model]) == 2


@pytest.mark.parametrize("error", [KernelError, ConfigError])  # of the learner and of the engine
def test_a_format_without_a_kernel_is_left_out(
    error: type[QarlError],
    asked: Comparison,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def measured(asked: Comparison, scheme: QuantScheme, dtype: str, prompts: list[Prompt]) -> list[Cell]:
        if dtype == "float32":
            raise error("no kernel", hint="another dtype")
        return [make_cell(scheme.label, gap("learner", "engine", 0))]

    monkeypatch.setattr(mismatch, "_in_own_process", measured)
    with patch.dict(os.environ):
        cells = run(replace(asked, dtypes=("float32", "bfloat16")), tmp_path)
        assert [cell.scheme for cell in cells] == ["w8a8_int8"]
        assert "w8a8_int8 float32: left out: no kernel; another dtype\n" in capsys.readouterr().out
        assert len(json.loads((tmp_path / "mismatch.json").read_text())) == 1
        with pytest.raises(error, match="no kernel"):
            run(replace(asked, dtypes=("float32",)), tmp_path)


@pytest.mark.parametrize(("prompt_tokens", "lengths"), [(4, [256]), (900, [123])])
def test_lengths_that_nobody_named_fit_the_model(
    asked: Comparison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prompt_tokens: int, lengths: list[int]
) -> None:
    measured = Mock(return_value=[])
    monkeypatch.setattr(mismatch, "_in_own_process", measured)
    monkeypatch.setattr(mismatch, "write_report", Mock(side_effect=KeyboardInterrupt))
    with patch.dict(os.environ), pytest.raises(KeyboardInterrupt):
        run(replace(asked, lengths=(), prompt_tokens=prompt_tokens), tmp_path)
    assert measured.call_args.args[0].lengths == lengths  # in contexts of 1,024


def test_a_process_that_dies_is_told(asked: Comparison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mismatch, "_in_own_process", Mock(side_effect=BrokenProcessPool("its process is gone")))
    with patch.dict(os.environ), pytest.raises(RolloutError, match="w8a8_int8 bfloat16: its process is gone; fewer"):
        run(asked, tmp_path)


def make_sample(*tokens: int) -> Sample:
    return Sample(Prompt("", "", "", (1,)), tokens, np.zeros(len(tokens), np.float32), "", "length", 0)


def test_tokens_in_common() -> None:
    assert _common(make_sample(4, 5, 6), make_sample(4, 5, 6)) == 3
    assert _common(make_sample(4, 5, 6), make_sample(4, 7, 6)) == 1


def test_one_optimizer_step(asked: Comparison) -> None:
    """The first step of Adam moves a weight by the learning rate, up or down."""
    policy = Policy(asked.model, torch.float32, QuantScheme(), "portable")
    rng = np.random.default_rng(0)
    rows = [tuple(int(t) for t in rng.integers(4, 256, 12)) for _ in range(4)]
    sequences = [TrainSequence(row[:4], row[4:], np.zeros(8, np.float32)) for row in rows]
    before = {name: parameter.detach().clone() for name, parameter in policy.named_parameters()}
    logp = score(policy, sequences)
    grids = {name: linear.quantized()["weight"].clone() for name, linear in quantized_linears(policy)}
    one_step(policy, sequences, lr=1e-3)
    moved = torch.cat([(p.detach() - before[name]).abs().flatten() for name, p in policy.named_parameters()])
    assert moved.max().item() == pytest.approx(1e-3, rel=1e-2)
    assert (moved > 0.9e-3).float().mean() > 0.5  # unseen tokens and dead gradients stay
    assert any((linear.quantized()["weight"] != grids[name]).any() for name, linear in quantized_linears(policy))
    gains = [float((new - old).sum()) for new, old in zip(score(policy, sequences), logp, strict=True)]
    assert gains[0] + gains[2] > 0 > gains[1] + gains[3]  # advantages 1, -1, 1, -1

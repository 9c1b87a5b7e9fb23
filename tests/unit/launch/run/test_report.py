import io
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from matplotlib.image import imread
from rich.console import Console

from launch.cli import main
from launch.run.curves import draw_curves, draw_pool
from launch.run.report import (
    Summary,
    _mean_mismatch,
    read_series,
    read_summary,
    render_summary,
    write_page,
    write_report,
)
from qarl.errors import ConfigError, DataError
from qarl.prompts.stats import BINS

SUMMARY = Summary(
    run="sort <demo>",
    scheme="w8a8_int8",
    kernels=["CPUInt8ScaledMMLinearKernel"],
    steps=54,
    rollouts=13824,
    train_seconds=83.4,
    tokens_per_s=1234.5,
    eval_before={"greedy": 0.861, "pass@1": 0.412, "level_02/pass@1": 0.7, "level_12/pass@1": 0.051},
    eval_after={"greedy": 0.953, "pass@1": 0.823, "level_02/pass@1": 0.99, "level_12/pass@1": 0.513},
    controls={"teacher": 0.347, "sft_continued/pass@1": 0.436},
    mismatch_aligned={"mean": 0.0, "max": 0.0, "k3": 0.0},
    mismatch_unaligned={"mean": 0.0543, "max": 1.43, "k3": 0.00321},
    files={"final model": "runs/demo/final", "report": "runs/demo/report.html"},
    weights_sha256="3e6e6956",
)


def make_run(folder: Path, steps: int = 54) -> Path:
    """A run folder whose metrics look like those of the quickstart."""
    rng = np.random.default_rng(0)
    rows = []
    for step in range(steps + 1):
        row: dict[str, float] = {"step": step, "time": float(step)}
        gain = 1 - math.exp(-step / 20)
        if step % 12 == 0 or step == steps:
            row |= {"eval/greedy": 0.86 + 0.09 * gain, "eval/pass@1": 0.41 + 0.4 * gain}
            row |= {"eval/num_prompts": 512.0 if step in (0, 54) else 256.0}
            row |= {"eval/pass@4": 0.75 + 0.2 * gain, "eval/level_06/pass@1": 0.5 * gain}
        if step:
            row |= {"reward/mean": 0.4 + 0.4 * gain + rng.normal(0, 0.03), "perf/tokens_per_s": 1250.0}
            row |= {"mismatch/logp_abs_max": 0.0, "mismatch/logp_abs_mean": 0.0}
            row |= {"mismatch/unaligned_logp_abs_max": rng.lognormal(0, 0.3)}
            row |= {"mismatch/unaligned_logp_abs_mean": 0.05 * rng.lognormal(0, 0.1)}
            times = {"sample": 0.4, "reward": 0.02, "prox": 0.15, "update": 0.6, "publish": 0.08}
            times = {name: t * rng.lognormal(0, 0.1) for name, t in times.items()}
            row |= {f"timing_s/{name}": t for name, t in times.items()} | {"timing_s/step": sum(times.values()) + 0.05}
            row |= {"actor/clip_fraction": 0.1 * rng.lognormal(0, 0.3), "actor/clip_fraction_neg": 0.04}
            row |= {"pool/unseen": max(0.0, 500 - 8 * step), "pool/low": 3.0 * step, "pool/high": 5.0 * step}
            row |= {"pool/success_mean": 0.5, "actor/lr": 1e-4, "timing_s/pool": 1e-3}
            row |= {f"pool/success_hist_{k}": rng.dirichlet(np.ones(10))[0] for k in range(10)}
            row |= {"augment/accepted": 3.0 * step, "augment/rejected_leak": 0.4 * step}
        rows.append(row)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_page_holds_the_figures(tmp_path: Path) -> None:
    write_report(make_run(tmp_path), SUMMARY)
    assert '"timing_s/other":"other"' in (tmp_path / "report.html").read_text()
    cells = set(re.split("<[^>]*>", (tmp_path / "report.html").read_text().partition("</article>")[0]))
    expected = {"sort &lt;demo&gt;", "0.861 → 0.953", "0.412 → 0.823", "0.051 → 0.513", "level 12", "teacher", "0.347"}
    expected |= {"SFT continued, pass@1", "0.436", "exactly 0", "5.43e-02", "1.43e+00", "3.21e-03", "54, 13,824"}
    expected |= {"CPUInt8ScaledMMLinearKernel", "1,234", "0:01:23", "runs/demo/report.html", "3e6e6956..."}
    assert expected <= cells


def test_a_page_shows_runs_side_by_side_also_those_that_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
        make_run(folder, steps=3)
    write_report(first, SUMMARY)
    assert main(["report", str(first), str(second)]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "comparison.html")
    page = (tmp_path / "comparison.html").read_text()
    assert "<title>sort &lt;demo&gt; and second</title>" in page
    assert "not ended, step 3 is the last so far" in page
    assert '"eval/greedy":[[0,0.8' in page  # an interval
    assert main(["report", str(second), "--out", str(tmp_path / "new" / "one.html")]) == 0
    assert "<title>second</title>" in (tmp_path / "new" / "one.html").read_text()
    assert not (second / "curves.png").exists()


def test_a_run_that_got_more_steps_has_not_ended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_report(make_run(tmp_path, steps=SUMMARY.steps + 2), SUMMARY)
    assert main(["report", str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "report.html")
    assert f"not ended, step {SUMMARY.steps + 2} is the last so far" in (tmp_path / "report.html").read_text()
    assert read_summary(tmp_path) == SUMMARY


def test_runs_of_one_name_are_called_by_their_paths(tmp_path: Path) -> None:
    folders = [tmp_path / seed / "quickstart" for seed in ("seed0", "seed1")] + [tmp_path / "other"]
    for folder in folders:
        folder.mkdir(parents=True)
        make_run(folder, steps=3)
    write_page(folders, tmp_path / "page.html", [None, None, None])
    names = re.findall("<h2>([^<]*)</h2>", (tmp_path / "page.html").read_text().partition("<script")[0])
    assert names[:3] == [str(folders[0]), str(folders[1]), "other"]


def test_picture_is_a_png_with_something_in_every_panel(tmp_path: Path) -> None:
    write_report(make_run(tmp_path), SUMMARY)
    pixels = imread(io.BytesIO((tmp_path / "curves.png").read_bytes()))[..., :3]
    assert pixels.shape[0] > 1000
    assert pixels.shape[1] > 1000
    top = pixels.shape[0] // 20  # below the title
    for rows in np.array_split(pixels[top:], 4, axis=0):
        for panel in np.array_split(rows, 2, axis=1):
            coloured = panel.max(axis=-1) - panel.min(axis=-1) > 0.2
            assert coloured.mean() > 0.001


@pytest.mark.parametrize(
    "series",
    [
        {"reward/mean": {1: 0.5}},
        {"mismatch/logp_abs_max": {1: 0.0, 2: 0.0}},
        {"mismatch/logp_abs_max": {1: math.inf, 2: math.nan, 3: 1e-9}},
        {"timing_s/step": {1: 1.0}},
        {"eval/greedy": {0: 0.5}},
        {f"pool/success_hist_{k}": {1: 0.1} for k in range(10)},
        {f"pool/success_hist_{k}": {1: 0.1, 5: math.nan, 9: 0.2} for k in range(9)},
        {"augment/accepted": {1: 0.0}, "augment/rejected_leak": {1: 2.0, 2: 3.0}},
    ],
)
def test_short_and_odd_runs_are_drawn(series: dict[str, dict[int, float]]) -> None:
    assert draw_curves(series, "run", SUMMARY.controls).startswith(b"\x89PNG")


def test_every_count_of_a_pool_is_drawn() -> None:
    """A bounded pool with an archive has more of them than there are colours."""
    ax = Figure().subplots()
    names = [*(f"state_{i}" for i in range(12)), "size"]
    draw_pool(ax, {f"pool/{name}": {1: 9.0, 2: 8.0} for name in names})
    assert [line.get_label() for line in ax.lines] == names
    assert len({(line.get_color(), line.get_linestyle()) for line in ax.lines}) == len(names)


def test_series_merge_the_log_calls_of_a_step(tmp_path: Path) -> None:
    rows = [{"step": 1, "time": 0.0, "b": 1.0}, {"step": 1, "time": 1.0, "a": "nan"}, {"step": 2, "time": 2.0, "b": 3}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    series = read_series(tmp_path)
    assert list(series) == ["a", "b"]
    assert series["b"] == {1: 1.0, 2: 3.0}
    assert math.isnan(series["a"][1])


@pytest.mark.parametrize("value", ['"abc"', "null", "[1]", "1" + "0" * 400], ids=["text", "null", "list", "too large"])
def test_a_metric_that_is_no_number_is_named(tmp_path: Path, value: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1, "reward/mean": {value}}}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl, reward/mean: not a number: "):
        read_series(tmp_path)


@pytest.mark.parametrize("step", ["true", "-1", "1.5", "1" + "0" * 30])
def test_a_step_that_is_none_is_named(tmp_path: Path, step: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": {step}, "reward/mean": 0.5}}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl:1: not a JSON object with a step"):
        read_series(tmp_path)


def test_any_number_can_be_drawn() -> None:
    """Values at the ends of float64, in every panel."""
    names = ("reward/mean", "eval/pass@1", "mismatch/logp_abs_max", "timing_s/step", "actor/clip", "pool/size")
    names += ("augment/accepted", *(f"pool/success_hist_{k}" for k in range(BINS)))
    for values in ((1e308, -1e308, 5e-324), (math.inf, -math.inf, math.nan)):
        assert draw_curves({name: dict(enumerate(values)) for name in names}, "odd", {}).startswith(b"\x89PNG")


def test_nothing_logged_is_an_error_and_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no folder of a run"):
        write_report(tmp_path, SUMMARY)
    (tmp_path / "config.yaml").touch()
    with pytest.raises(DataError, match="no metrics"):
        write_report(tmp_path, SUMMARY)
    assert [file.name for file in tmp_path.iterdir()] == ["config.yaml"]


def test_terminal_summary_fits_eighty_columns() -> None:
    console = Console(file=io.StringIO(), width=80)
    console.print(render_summary(SUMMARY))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for figure in ["0.412 -> 0.823", "0.700 -> 0.990", "level 12", "0.347", "exactly 0", "1.43e+00", "1,234"]:
        assert figure in text
    assert "CPUInt8ScaledMMLinearKernel" in text
    assert max(map(len, text.splitlines())) <= 80


def test_a_summary_without_comparison_says_so() -> None:
    change = {"kernels": [], "eval_before": {"greedy": 0.5}, "eval_after": {}, "controls": {}, "files": {}}
    change |= {"mismatch_aligned": {"mean": 1e-3}, "mismatch_unaligned": {}}
    bare = SUMMARY.model_copy(update=change)
    console = Console(file=io.StringIO(), width=80)
    console.print(render_summary(bare))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "0.500 -> ?" in text
    assert "not measured" in text
    assert "Controls" not in text


def test_a_largest_gap_that_is_no_number_stays_one() -> None:
    gaps = (0.0, math.nan, 0.0)
    rows = [{f"mismatch/{name}": gap for name in ("logp_abs_mean", "logp_abs_max", "k3_kl")} for gap in gaps]
    assert math.isnan(_mean_mismatch(rows, "mismatch/")["max"])


rates = st.dictionaries(st.text(max_size=8), st.floats(allow_nan=False))


@given(before=rates, aligned=rates, kernels=st.lists(st.text()), seconds=st.floats(allow_nan=False))
def test_summary_survives_json(
    before: dict[str, float], aligned: dict[str, float], kernels: list[str], seconds: float
) -> None:
    values = {"kernels": kernels, "train_seconds": seconds, "eval_before": before, "mismatch_aligned": aligned}
    summary = SUMMARY.model_copy(update=values)
    text = summary.model_dump_json(indent=2)
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert Summary.model_validate_json(text) == summary


def test_read_summary_returns_what_was_written_or_says_why_not(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no summary"):
        read_summary(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"step": 3}\n')
    with pytest.raises(DataError, match="the run has not ended: step 3 is its last so far; `qarl train` continues it"):
        read_summary(tmp_path)
    (tmp_path / "metrics.jsonl").unlink()
    write_report(make_run(tmp_path, steps=2), SUMMARY)
    assert read_summary(tmp_path) == SUMMARY
    for content in (b'{"run": 3}', b"\xff", b""):
        (tmp_path / "summary.json").write_bytes(content)
        with pytest.raises(DataError, match=r"summary\.json: not a run summary: \S.*; delete it"):
            read_summary(tmp_path)

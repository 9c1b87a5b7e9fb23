import io
import json
import logging
import math
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from launch.demo import partial_credit
from launch.run import terminal, tracking, wandb_run
from launch.run.report import read_series
from launch.run.tracking import AUGMENT_FILE, METRICS_FILE, SAMPLES_FILE, RunTracker, read_log
from launch.run.wandb_run import check_login
from qarl.config.io import validate
from qarl.config.run import Config
from qarl.errors import INTERRUPTED, ConfigError, DataError, ResourceError
from qarl.metrics import Histogram
from qarl.types import Activity, AugmentOutcome, Prompt, Sample, Score
from tests.support.records import row_of

HISTOGRAM = Histogram((0.5, 1.0, 2.0), (3, 4))
STEP = {"reward/mean": 0.5, "mismatch/logp_abs_max": 0.0, "perf/tokens_per_s": 1870.0}


@pytest.fixture(autouse=True)
def without_usage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "usage", lambda _: {})


def config(mode: str = "disabled", **tracked: object) -> Config:
    tree = {"model": {"path": "m"}, "task": {"kind": "sorting"}, "tracking": {"wandb_mode": mode, **tracked}}
    return validate(tree, "test")


def sample(text: str = "12") -> Sample:
    prompt = Prompt("p", "21=", "12", (1, 2))
    return Sample(prompt, (3, 4), np.array([-1.0, -0.5], np.float32), text, "stop", version=7)


def steps(path: Path) -> list[int]:
    return [row["step"] for row in read_log(path)]


def test_each_log_call_is_a_whole_line_at_once(tmp_path: Path) -> None:
    tracker = RunTracker(config(), tmp_path, 0, 3)
    tracker.log(1, STEP)
    assert read_log(tmp_path / METRICS_FILE)[0].items() >= {"step": 1, **STEP}.items()  # before close
    tracker.log(2, {"a": math.nan, "b": math.inf})
    tracker.close()
    tracker.close()
    text = (tmp_path / METRICS_FILE).read_text().splitlines()[1]
    row = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert math.isnan(float(row["a"]))
    assert float(row["b"]) == math.inf
    assert not (tmp_path / "wandb").exists()


def test_every_log_is_on_the_disk_before_a_checkpoint_can_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = dict[str, int]()

    def sync(opened: int) -> None:
        file = Path(f"/proc/self/fd/{opened}").resolve()
        synced[file.name] = file.stat().st_size

    tree = config().model_dump()
    tree["pool"]["augment"]["per_step"] = 1
    tracker = RunTracker(validate(tree, "test"), tmp_path, 0, 3)
    monkeypatch.setattr(os, "fsync", sync)
    tracker.log(1, STEP)
    tracker.table(1, "samples", [row_of(sample(), Score(1.0))])
    tracker.augmented(1, [AugmentOutcome("p", "21", "", "", "12")])
    assert synced.keys() == {METRICS_FILE, SAMPLES_FILE, AUGMENT_FILE}
    tracker.close()
    assert synced == {name: (tmp_path / name).stat().st_size for name in synced}


def test_a_histogram_is_edges_and_counts(tmp_path: Path) -> None:
    tracker = RunTracker(config(), tmp_path, 0, 3)
    tracker.log(1, {**STEP, "w_hist": HISTOGRAM})
    tracker.close()
    (row,) = read_log(tmp_path / METRICS_FILE)
    assert row["w_hist"] == {"edges": [0.5, 1.0, 2.0], "counts": [3, 4]}
    assert read_series(tmp_path).keys() == STEP.keys()


def test_what_became_of_new_problems_is_kept_up_to_the_start_of_a_resumed_run(tmp_path: Path) -> None:
    tree = config().model_dump()
    tree["pool"]["augment"]["per_step"] = 1
    growing = validate(tree, "test")
    outcomes = [AugmentOutcome("p", "21", "", "", "12"), AugmentOutcome("q", "x", "parse", "no digits")]
    for start in (0, 1):
        tracker = RunTracker(growing, tmp_path, start, 3)
        tracker.augmented(start + 1, outcomes)
        tracker.close()
    rows = read_log(tmp_path / AUGMENT_FILE)
    assert [row["step"] for row in rows] == [1, 1, 2, 2]
    assert rows[2:] == [{"step": 2, **asdict(outcome)} for outcome in outcomes]
    (tmp_path / "other").mkdir()
    RunTracker(config(), tmp_path / "other", 0, 3).close()
    assert not (tmp_path / "other" / AUGMENT_FILE).exists()


@given(logged=st.lists(st.integers(0, 9)), start=st.integers(0, 9), cut=st.integers(0, 40))
def test_resume_keeps_exactly_the_whole_lines_up_to_its_start(
    tmp_path_factory: pytest.TempPathFactory, logged: list[int], start: int, cut: int
) -> None:
    folder = tmp_path_factory.mktemp("run")
    path = folder / METRICS_FILE
    lines = [json.dumps({"step": step, "time": 0.0, "x": "é"}, ensure_ascii=False) + "\n" for step in logged]
    data = "".join(lines).encode()
    path.write_bytes(data[: max(0, len(data) - cut)])
    whole = [json.loads(line)["step"] for line in path.read_bytes().split(b"\n")[:-1]]

    tracker = RunTracker(config(), folder, start, 20)
    tracker.log(start + 1, {"x": 1.0})
    tracker.close()

    kept = [step for step in whole if step <= start] if start else []
    assert steps(path) == [*kept, start + 1]
    assert not list(folder.glob("*.part"))


@pytest.mark.parametrize(("start", "kept"), [(4, ["eval", "reward"]), (6, ["eval", "reward", "reward"])])
def test_an_evaluation_that_is_made_again_is_logged_once(tmp_path: Path, start: int, kept: list[str]) -> None:
    """A run that is killed between its last evaluation and its end makes that evaluation again, and no other."""
    rows = [(4, "eval/greedy"), (4, "reward/mean"), (6, "reward/mean"), (6, "eval/greedy")]
    (tmp_path / METRICS_FILE).write_text("".join(json.dumps({"step": step, name: 0.5}) + "\n" for step, name in rows))
    of_six = config().model_copy(update={"train": config().train.model_copy(update={"steps": 6})})
    RunTracker(of_six, tmp_path, start, 6).close()
    assert [list(row)[1].partition("/")[0] for row in read_log(tmp_path / METRICS_FILE)] == kept


def test_damage_inside_a_log_is_named(tmp_path: Path) -> None:
    (tmp_path / METRICS_FILE).write_text('{"step": 1}\n{"step": \n{"step": 3}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl:2: not a JSON object"):
        RunTracker(config(), tmp_path, 2, 3)


def test_samples_are_kept_with_their_scores(tmp_path: Path) -> None:
    tracker = RunTracker(config(), tmp_path, 0, 3)
    tracker.table(2, "samples", [row_of(sample(), Score(1.0)), row_of(sample("x\n[b]"), Score(0.0))])
    tracker.close()
    rows = read_log(tmp_path / SAMPLES_FILE)
    values = ["21=", "12", "12", 1.0, 0.0, 0.0, "stop", 7, -0.75, [-1.0, -0.5]]
    assert list(rows[0].values())[2:] == values
    assert rows[1]["response"] == "x\n[b]"
    assert {row["table"] for row in rows} == {"samples"}
    assert rows[0].keys() == {"step", "table", *row_of(sample(), Score(1.0))} - {"token_ids"}
    RunTracker(config(), tmp_path, 1, 3).close()
    assert read_log(tmp_path / SAMPLES_FILE) == []


def test_a_table_may_have_more_columns(tmp_path: Path) -> None:
    tracker = RunTracker(config(), tmp_path, 0, 3)
    more = {"error_share": 0.5, "error_tokens": "repeated 0-1"}
    tracker.table(2, "error_tokens", [row_of(sample(), Score(1.0)) | more])
    tracker.close()
    (row,) = read_log(tmp_path / SAMPLES_FILE)
    assert (row["table"], row["error_share"], row["error_tokens"]) == ("error_tokens", 0.5, "repeated 0-1")
    assert row["response"] == "12"


@pytest.mark.parametrize(("mean", "shown"), [(0.25, False), (0.5, True)])
def test_a_mean_reward_that_equals_the_accuracy_is_not_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], mean: float, shown: bool
) -> None:
    tracker = RunTracker(config(), tmp_path, 0, 3)
    tracker.log(0, {"eval/pass@1": 0.25, "eval/mean_reward": mean})
    tracker.close()
    assert ("mean_reward" in capsys.readouterr().out) == shown
    assert read_log(tmp_path / METRICS_FILE)[0]["eval/mean_reward"] == mean


def test_without_a_terminal_each_step_is_a_plain_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tracker = RunTracker(config(), tmp_path, 0, 3)
    tracker.log(0, {"eval/greedy": 0.86, "eval/level_06/pass@1": 0.1})
    tracker.log(1, STEP)
    tracker.log(2, {**STEP, "mismatch/logp_abs_max": 0.0123})
    tracker.note("[red]as it is[/red] " + "x" * 100)
    tracker.close()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "step 0/3  held-out  greedy 0.860"
    assert lines[1] == "step 1/3  reward 0.500  |d log p| max 0  1,870 tokens/s  ETA -"
    assert "|d log p| max 0.012 " in lines[2]
    assert lines[2].endswith("ETA 0:00:00")
    assert lines[3] == "[red]as it is[/red] " + "x" * 100
    assert len(lines) == 4


@pytest.fixture
def out(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What a terminal gets."""
    written = io.StringIO()
    made = Console(file=written, force_terminal=True, force_interactive=True, width=120)
    monkeypatch.setattr(terminal, "Console", lambda: made)
    return written


@pytest.mark.parametrize("wanted", [True, False])
def test_a_terminal_shows_a_live_view_when_wanted(tmp_path: Path, out: io.StringIO, wanted: bool) -> None:
    tracker = RunTracker(config(progress=wanted), tmp_path, 1, 3)
    tracker.note("before the view")
    hidden, shown = "\x1b[?25l", "\x1b[?25h"
    assert hidden not in out.getvalue()
    tracker.phase("sample")
    tracker.log(2, STEP)
    tracker.note("above the view")
    tracker.close()
    text = out.getvalue()
    assert (hidden in text) == wanted
    assert text.count(hidden) == text.count(shown)  # the cursor comes back
    assert "above the view" in text
    assert "step 2/3" in text
    assert "|d log p| max" in text


def test_the_terminal_shows_the_actors_that_a_run_watches(tmp_path: Path, out: io.StringIO) -> None:
    sections = {"model": {"path": "m"}, "task": {"kind": "sorting"}, "tracking": {"wandb_mode": "disabled"}}
    tracker = RunTracker(validate(sections, "test"), tmp_path, 0, 3)
    tracker.watch("w", lambda: [Activity("loading")])
    tracker.phase("publish")
    tracker.close()
    assert "publish 0 s  w0 loading" in out.getvalue()


def records(folder: Path) -> list[dict[str, Any]]:
    """Records of the one .wandb file in `folder`, read by W&B's own tool."""
    (file,) = folder.glob("run-*.wandb")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
    out = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    return [json.loads(line) for line in out.splitlines()]


@pytest.mark.usefixtures("offline_wandb")
def test_wandb_offline_holds_the_run_under_one_id(tmp_path: Path) -> None:
    ids = set()
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "model.safetensors").write_bytes(b"weights")
    for start in (0, 1):
        tracker = RunTracker(config("offline", wandb_group="arms"), tmp_path, start, 2)
        for step in (start + 1, start + 2):
            tracker.log(step, {**STEP, "w_hist": HISTOGRAM})
            tracker.table(step, "samples", [row_of(sample(), Score(1.0)) | {"mismatch": math.nan}] * step)
        tracker.exported({"final model": tmp_path / "final"})
        tracker.close()
        found = records(tmp_path / "wandb" / "latest-run")
        history = [record["history"]["item"] for record in found if record["type"] == "history"]
        assert history[-4].items() >= {"step": start + 1, **STEP}.items()
        drawn = {name: value for name, value in history[-2].items() if name.startswith("w_hist")}
        assert "histogram" in str(drawn)
        assert "[3, 4]" in str(drawn)
        assert [history[-3]["samples.nrows"], history[-1]["samples.nrows"]] == [start + 1, 2 * start + 3]
        assert history[-1]["samples._type"] == "incremental-table-file"
        table = json.loads((tmp_path / "wandb" / "latest-run" / "files" / history[-1]["samples.path"]).read_text())
        assert {row[table["columns"].index("mismatch")] for row in table["data"]} == {None}  # NaN is no JSON
        metrics = [record["metric"] for record in found if record["type"] == "metric"]
        assert any(metric.get("glob_name") == "*" and metric["step_metric"] == "step" for metric in metrics)
        kept = {metric["name"]: metric["summary"] for metric in metrics if "summary" in metric}
        assert kept["reward/mean"] == {"last": True, "max": True}
        assert kept["mismatch/logp_abs_max"] == {"last": True, "min": True}
        artifacts = {record["artifact"]["type"]: record["artifact"] for record in found if record["type"] == "artifact"}
        assert artifacts.keys() >= {"code", "model"}
        code = json.dumps(artifacts["code"])
        assert all(name in code for name in ("trainer/loop.py", "config.yaml"))
        assert (tmp_path / "final").as_uri() in json.dumps(artifacts["model"])
        assert json.loads(artifacts["model"]["metadata"])["base_model"] == str(Path("m").absolute())
        (run,) = [record["run"] for record in found if record["type"] == "run"][:1]
        assert run["run_group"] == "arms"
        ids.add(run["run_id"])
    assert ids == {(tmp_path / "wandb_id").read_text()}


@pytest.mark.usefixtures("offline_wandb")
def test_the_code_artifact_has_the_files_of_the_users_functions(tmp_path: Path) -> None:
    """Also of two with one name, and of one that is a partial."""
    judge, own = tmp_path / "a" / "mine.py", tmp_path / "b" / "mine.py"
    for file in (judge, own):
        file.parent.mkdir()
    judge.write_text("from functools import partial\n\njudge = partial(lambda *args, bonus: bonus, bonus=1.0)\n")
    own.write_text("from qarl.protocols import Tracker\n\ndef make(config, run_dir): return Tracker()\n")
    tree = config("offline", trackers=["jsonl", "wandb", f"{own}:make"]).model_dump()
    tree["reward"] |= {"kind": "custom", "function": f"{judge}:judge"}
    tree["objective"] = {"kind": "custom", "function": "launch.demo.partial_credit:right_beginning"}
    RunTracker(validate(tree, "test"), tmp_path, 0, 2).close()
    (code,) = [row["artifact"] for row in records(tmp_path / "wandb" / "latest-run") if row["type"] == "artifact"]
    named = [entry["path"] for entry in code["manifest"]["contents"]]
    files = sorted("/" + path.removeprefix("functions/") for path in named if path.startswith("functions/"))
    assert files == sorted(str(Path(file).resolve()) for file in (judge, own, partial_credit.__file__))


@pytest.mark.usefixtures("offline_wandb")
def test_wandb_hears_of_alerts_and_of_a_run_that_is_stopped(tmp_path: Path) -> None:
    tree = config("offline").model_dump()
    tree["mismatch"]["warn_above"] = 0.1
    tracker = RunTracker(validate(tree, "test"), tmp_path, 0, 2)
    tracker.log(1, {**STEP, "mismatch/logp_abs_max": 0.5})
    tracker.alert("mismatch no longer zero", "step 1: ...")
    with pytest.raises(DataError), tracker:
        raise DataError("the data is wrong")
    found = records(tmp_path / "wandb" / "latest-run")
    alerts = [record["alert"] for record in found if record["type"] == "alert"]
    titles = ["mismatch above its bound", "mismatch no longer zero", "run stopped"]
    assert [alert["title"] for alert in alerts] == titles
    assert (alerts[-1]["level"], alerts[-1]["text"]) == ("ERROR", "the data is wrong")
    assert [record["exit"].get("exit_code", 0) for record in found if record["type"] == "exit"] == [1]


@pytest.mark.usefixtures("offline_wandb")
@pytest.mark.parametrize("in_c", [False, True])
def test_an_interrupt_is_no_error_for_wandb(tmp_path: Path, in_c: bool) -> None:
    """A signal that comes inside of a C extension is the cause of a SystemError."""
    error = SystemError("returned a result with an exception set") if in_c else KeyboardInterrupt()
    error.__cause__ = KeyboardInterrupt() if in_c else None
    with pytest.raises(type(error)), RunTracker(config("offline"), tmp_path, 0, 2):
        raise error
    (alert,) = [row["alert"] for row in records(tmp_path / "wandb" / "latest-run") if row["type"] == "alert"]
    assert (alert["level"], alert["text"]) == ("INFO", INTERRUPTED)


def test_tables_have_a_bound(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for start, kept in ((0, 3), (1, 5)):
        tracker = RunTracker(config(table_max_rows=5), tmp_path, start, 9)
        tracker.table(start + 1, "samples", [row_of(sample(), Score(1.0))] * 3)
        tracker.close()
        assert len(read_log(tmp_path / SAMPLES_FILE)) == kept
    assert capsys.readouterr().out == "step 2: the tables have tracking.table_max_rows rows; they get no more\n"


def test_a_step_has_the_memory_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "usage", lambda folder: {"memory/driver": float(folder == tmp_path)})
    tracker = RunTracker(config(), tmp_path, 0, 3)
    tracker.log(0, {"eval/greedy": 0.5})
    tracker.log(1, STEP)
    tracker.close()
    assert [row.get("memory/driver") for row in read_log(tmp_path / METRICS_FILE)] == [None, 1.0]


def test_wandb_gets_a_repeated_step_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that was killed after step 4 and continues after step 1: only its last row may not have arrived."""
    sent: list[tuple[int, str]] = []

    class Run:
        def log(self, row: dict[str, Any]) -> None:
            sent.append((row["step"], list(row)[1]))

        def define_metric(self, name: str, step_metric: str, summary: str) -> None:
            assert (name, summary) in {("reward/mean", "last,max"), ("eval/greedy", "last,max")}

        def finish(self, exit_code: int) -> None:
            assert exit_code == 0

    monkeypatch.setattr(wandb_run, "_start", lambda *_: Run())
    monkeypatch.setattr(wandb_run, "_log_code", lambda *_: None)
    for start, last in ((0, 4), (1, 5)):
        tracker = RunTracker(config("offline", trackers=["jsonl", "wandb"]), tmp_path, start, 6)
        for step in range(start + 1, last + 1):
            tracker.log(step, {"reward/mean": 0.5})
            tracker.table(step, "samples", [{"reward": 0.5}])
            if step != 4 or start:  # killed before
                tracker.log(step, {"eval/greedy": 0.5})
        tracker.close()
    rows = [(step, name) for step in range(1, 6) for name in ("reward/mean", "samples", "eval/greedy")]
    assert sorted(set(sent)) == sorted(rows)
    assert sorted(row for row in rows if sent.count(row) > 1) == [(4, "reward/mean"), (4, "samples")]
    assert [row["step"] for row in read_log(tmp_path / METRICS_FILE)] == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]


def test_wandb_online_without_login_names_the_mend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    with pytest.raises(ResourceError, match=r"tracking\.wandb_mode=offline"):
        RunTracker(config("online"), tmp_path, 0, 2)
    with pytest.raises(ResourceError, match=r"no key on this machine; run `wandb login`, or set tracking\.wandb_mode="):
        check_login(config("online"))  # before a run, and without a prompt
    for mode in ("offline", "disabled"):
        check_login(config(mode))
    check_login(config("online", trackers=["jsonl"]))


@pytest.mark.usefixtures("offline_wandb")
def test_a_key_of_wandb_in_a_wrong_form_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "tooshort")
    with pytest.raises(ResourceError, match=r"API key must have 40\+ characters, has 8; correct or unset that key, or"):
        check_login(config("online"))
    check_login(config("offline"))


@pytest.mark.parametrize(
    ("setting", "found"),
    [
        ("WANDB_BASE_URL=nonsense", "base_url is 'nonsense': Input should be a valid URL"),
        ("WANDB_PROJECT=a/b", "'a/b'"),
    ],
)
@pytest.mark.parametrize("mode", ["offline", "online"])
def test_a_setting_that_wandb_refuses_is_one_line(
    setting: str, found: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(*setting.split("="))
    with pytest.raises(ResourceError, match=r"^W&B refuses its settings: ") as caught:
        check_login(config(mode))
    assert found in str(caught.value)
    check_login(config("disabled"))


def test_disabled_never_imports_wandb(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; "
        "from launch.run.tracking import RunTracker; from qarl.config.io import *; "
        "t = RunTracker(validate({'model': {'path': 'm'}, 'task': {'kind': 'sorting'}, "
        f"'tracking': {{'wandb_mode': 'disabled'}}}}, 't'), Path({str(tmp_path)!r}), 0, 1); "
        "t.log(1, {'reward/mean': 1.0}); t.table(1, 'samples', []); t.close(); sys.exit('wandb' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


def test_notes_are_logged_with_their_level(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    tracker = RunTracker(config(), tmp_path, 0, 3, verbosity="quiet")
    with caplog.at_level(logging.INFO):
        tracker.note("a fact")
        tracker.note("a fault", level=logging.WARNING)
        tracker.alert("a title", "an alert")
    tracker.close()
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("INFO", "a fact"),
        ("WARNING", "a fault"),
        ("WARNING", "an alert"),
    ]
    assert capsys.readouterr().out == "a fault\nan alert\n"


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("raises", r"own_tracker\.py:raises: ZeroDivisionError: division by zero"),
        ("nothing", r"own_tracker\.py:nothing makes a NoneType, which lacks the method log; "),
    ],
)
def test_a_tracker_of_the_users_that_cannot_work(
    name: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code = "def raises(config, run_dir): 1 / 0\ndef nothing(config, run_dir): pass\n"
    (tmp_path / "own_tracker.py").write_text(code)
    with pytest.raises(ConfigError, match=rf"tracking\.trackers: {line}"):
        RunTracker(config(trackers=["jsonl", f"own_tracker.py:{name}"]), tmp_path, 0, 3)

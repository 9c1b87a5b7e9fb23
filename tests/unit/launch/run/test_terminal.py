import io
import logging
import math

import pytest
from rich.console import Console

from launch.run import terminal
from launch.run.terminal import Terminal, sparkline
from qarl.types import Activity

STEP = {"reward/mean": 0.5, "mismatch/logp_abs_max": 0.0, "perf/tokens_per_s": 1870.0, "timing_s/sample": 0.5}


def view(monkeypatch: pytest.MonkeyPatch, **env: str) -> tuple[Terminal, io.StringIO]:
    """A run's terminal, and what it writes."""
    out = io.StringIO()
    made = Console(file=out, force_terminal=True, force_interactive=True, width=140, _environ=env)
    monkeypatch.setattr(terminal, "Console", lambda: made)
    return Terminal("mine", 9, 0, "normal", live=True), out


def drawn(shown: Terminal, width: int = 140) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(shown)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_the_live_view_has_progress_curves_states_and_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    shown, _ = view(monkeypatch)
    assert drawn(shown).splitlines()[1:] == ["start 0 s"]
    shown.watch("w", lambda: [Activity("idle")] * 2)
    shown.watch("r", lambda: [Activity("learning")])
    for step, reward in enumerate((0.0, 0.5, 1.0), start=1):
        shown.show(step, {**STEP, "reward/mean": reward})
    shown.show(3, {"eval/pass@1": 0.25})
    shown.note("worker 0 died", logging.WARNING)
    shown.note("a fact")
    shown.phase("update")
    text = drawn(shown)
    shown.close()
    assert "mine" in text
    assert "step 3/9" in text
    assert "ETA 0:00:00" in text
    assert "▁▅█  1" in text  # round(3.5) is 4
    assert "accuracy" in text
    assert "1,870" in text
    assert "update 0 s  w0 idle  w1 idle  r0 learning" in text
    assert "! worker 0 died" in text
    assert "a fact" not in text


WORKERS = [Activity("sampling", 3, 8), Activity("sampling", 0, 7), Activity("restarting"), Activity("sampling", 1, 9)]


@pytest.mark.parametrize(
    ("width", "line"),
    [
        (90, "sample 0 s  w0 sampling 3/8  w1 sampling 0/7  w2 restarting  w3 sampling 1/9  r0 idle"),
        (84, "sample 0 s  w0-1,3 sampling 4/24  w2 restarting  r0 idle"),
        (60, "sample 0 s  w0-1,3 sampling 4/24  w2 restarting  r0 idle"),
        (40, "sample 0 s  w0-1,3 sampling 4/24  w2 re…"),
    ],
)
def test_actors_that_do_the_same_are_told_together_where_the_line_is_short(width: int, line: str) -> None:
    shown = Terminal("mine", 9, 0, "normal", live=False)
    shown.watch("w", lambda: WORKERS)
    shown.watch("r", lambda: [Activity("idle")])
    shown.phase("sample")
    assert drawn(shown, width).splitlines()[1:] == [line]


def test_plain_lines_have_no_actors(capsys: pytest.CaptureFixture[str]) -> None:
    shown = Terminal("mine", 9, 0, "normal", live=True)  # but pytest's standard output is no terminal
    shown.watch("w", lambda: pytest.fail("nobody looks"))
    shown.phase("sample")
    shown.show(1, STEP)
    assert capsys.readouterr().out.startswith("step 1/9  reward 0.500")


def test_the_view_keeps_its_height_whatever_actors_do(monkeypatch: pytest.MonkeyPatch) -> None:
    shown, _ = view(monkeypatch)
    shown.show(1, STEP)
    heights = set()
    for words in ["idle"], ["sampling", "restarting"]:
        shown.watch("w", lambda words=words: [Activity(word) for word in words * 9])
        shown.phase("a_phase_with_a_long_name")
        heights.add(drawn(shown, 60).count("\n"))
    shown.close()
    assert len(heights) == 1


def test_a_narrow_view_loses_the_bar_and_the_name_before_the_numbers() -> None:
    shown = Terminal("a-very-long-name-of-a-run", 1200, 1000, "normal", live=False)
    shown.phase("update")
    for width in (60, 140):
        head, state = drawn(shown, width).splitlines()
        assert head.endswith("step 1000/1200  0:00:00 spent  ETA -")
        assert ("…" in head) == (width == 60)
        assert state == "update 0 s"


def test_the_view_begins_with_the_first_phase_and_ends_once(monkeypatch: pytest.MonkeyPatch) -> None:
    shown, out = view(monkeypatch)
    assert out.getvalue() == ""  # nothing is hidden before the first phase
    shown.phase("pool")
    shown.close()
    shown.close()
    assert out.getvalue().count("\x1b[?25l") == out.getvalue().count("\x1b[?25h") == 1


@pytest.mark.parametrize(("env", "coloured"), [({}, True), ({"NO_COLOR": "1"}, False)])
def test_colours_are_left_out_when_asked(monkeypatch: pytest.MonkeyPatch, env: dict[str, str], coloured: bool) -> None:
    shown, out = view(monkeypatch, TERM="xterm-256color", **env)
    shown.show(1, STEP)
    shown.phase("sample")
    shown.close()
    assert ("\x1b[36m" in out.getvalue()) == coloured


def test_a_log_says_when_something_long_begins(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Once for each time that it begins; a live view shows the phase itself, and steps have lines of their own."""
    phases = (
        "start_ray",
        "start",
        "publish",
        "evaluate",
        "sample",
        "update",
        "evaluate",
        "export",
        "controls",
        "report",
    )
    plain = Terminal("mine", 9, 0, "normal", live=False)
    for phase in phases:
        plain.phase(phase)
    assert capsys.readouterr().out.splitlines() == [
        "starting rollout workers and learner",
        "evaluating on the held-out prompts",
        "evaluating on the held-out prompts",
        "exporting the model",
        "evaluating the controls",
    ]
    shown, out = view(monkeypatch)
    for phase in phases:
        shown.phase(phase)
    shown.close()
    assert "on the held-out prompts" not in out.getvalue()


@pytest.mark.parametrize(
    ("verbosity", "lines"),
    [
        ("quiet", ["trouble"]),
        ("normal", ["a fact", "trouble", "step 1/9  reward 0.500  |d log p| max 0  1,870 tokens/s  ETA -"]),
        (
            "verbose",
            ["a fact", "trouble", "step 1/9  reward 0.500  |d log p| max 0  1,870 tokens/s  ETA -  sample 0.50s"],
        ),
    ],
)
def test_how_much_is_said(capsys: pytest.CaptureFixture[str], verbosity: terminal.Verbosity, lines: list[str]) -> None:
    shown = Terminal("mine", 9, 0, verbosity, live=True)
    logging.getLogger("a.library").warning("of a library")
    shown.note("a fact")
    shown.note("trouble", logging.WARNING)
    shown.show(1, STEP)
    shown.close()
    logging.getLogger("a.library").warning("later")
    said = capsys.readouterr()
    assert said.out.splitlines() == lines
    assert ("WARNING a.library: of a library" in said.err) == (verbosity == "verbose")
    assert "later" not in said.err


def test_the_number_of_prompts_is_no_accuracy(capsys: pytest.CaptureFixture[str]) -> None:
    shown = Terminal("mine", 9, 0, "normal", live=False)
    shown.show(3, {"eval/pass@1": 0.25, "eval/num_prompts": 256.0})
    assert capsys.readouterr().out.splitlines() == ["step 3/9  held-out  pass@1 0.250"]


def test_a_sparkline_spans_its_values() -> None:
    assert sparkline([0, 1, 2, 7]) == "▁▂▃█"
    assert sparkline([5, 5]) == "▁▁"
    assert sparkline([math.nan, 1, math.inf, 2]) == " ▁ █"
    assert sparkline([]) == ""


def test_a_step_claims_no_more_agreement_than_it_has_measured(capsys: pytest.CaptureFixture[str]) -> None:
    trusted = {"reward/mean": 0.5, "actor/seq_ratio_max_dev_first_minibatch": 0.0, "perf/tokens_per_s": 7.0}
    made = Terminal("mine", 9, 0, "normal", live=False)
    made.show(1, trusted)
    made.show(2, {**trusted, "staleness/age_mean": 1.0})
    agreed, stale = capsys.readouterr().out.splitlines()
    assert "|d log p| max 0 of the first minibatch" in agreed
    assert "|d log p|" not in stale
    assert "samples 1.0 versions old" in stale

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launch.run.gaps import Cell, Gap, Part
from launch.run.page.build import MAX_POINTS, MAX_SAMPLES, PageRun, build_page, wilson
from launch.run.tables import MAX_TOKENS, with_tokens
from tests.support.browser import look
from tests.support.keyboard import Keyboard

STEPS = range(1, 5)


def gap(part: Part, name: str, size: float) -> Gap:
    rows = [np.zeros(8, np.float32)]
    return Gap.between(part, name, [row + np.float32(size) for row in rows], rows)


ROW = {
    "table": "samples",
    "prompt": "21=",
    "response": "1</script>2",
    "reward": 1.0,
    "mismatch": "nan",
    "staleness": 0.25,
    "tokens": ["1", "</script>", "2"],
    "token_logprobs": [-0.1, -3.0, 0.0],
    "token_ratios": [1.0, 2.0, 0.5],
    "token_errors": [0, 1, 0],
}


CELL = Cell("model", "w8a8_int8", "bfloat16", ["Kernel"], 8, 2, -1.5, [gap("learner", "engine", 0.0)])
CELL = replace(CELL, gaps=[*CELL.gaps, gap("format", "kernel", 1e-4), gap("rounding", "rope", 1e-6)])


def run_of(
    name: str, trace: dict[str, Any] | None = None, gaps: tuple[Cell, ...] = (), **series: list[float]
) -> PageRun:
    """A run with a value at each of the first steps, of `reward__mean` for example."""
    values = {key.replace("__", "/"): dict(zip(STEPS, points, strict=False)) for key, points in series.items()}
    samples = [{**ROW, "step": step, "reward": reward} for step in (2, 4) for reward in (0.0, 1.0)]
    samples += [{**ROW, "step": 4, "table": "error_tokens", "response": "bad", "tokens": ["b", "ad"]}]
    tables = [("Run", ("", ""), [("name", name), ("kernels", "<none>")])]
    return PageRun(name, "w8a8_int8, 4 steps", values, tables, {"teacher": 0.4}, samples, trace, gaps)


TRACE = {"step": 4, "seconds": 2.0, "rows": ["driver", "rank 0, idle 75%"]}
TRACE |= {"spans": [[0, "sample", 0.0, 1.5], [1, "update", 1.5, 2.0]]}
RUN = run_of(
    "first",
    TRACE,
    (CELL,),
    reward__mean=[0.2, 0.4, 0.8, 0.7],
    eval__greedy=[0.5, 0.9],
    mismatch__logp_abs_max=[0.0, 0.0, 1e-4, 1.0],
    timing_s__sample=[1.0, 2.0, 3.0, 4.0],
    timing_s__prox=[1.0],
    timing_s__update=[1.0, 1.0, 1.0, 1.0],
)
SECOND = run_of("second", reward__mean=[0.1, 0.2, 0.3, float("inf")], memory__driver=[1.0, 1.1, 1.2, 1.3])


class Parsed(HTMLParser):
    """The tags that are open at the end, and every address in the page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str | None] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value for key, value in attrs if key in ("src", "href")]
        if tag not in ("meta", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def data_of(page: str) -> Any:
    match = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert match
    return json.loads(match[1], parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_the_page_needs_no_network_and_holds_the_tables() -> None:
    page = build_page([RUN, SECOND], "first & second")
    parsed = Parsed(page)
    assert parsed.open == []
    assert parsed.addresses == ["#samples"]
    assert "default-src 'none'" in page
    assert "<title>first &amp; second</title>" in page
    assert '<tr><th scope="row">kernels</th><td>&lt;none&gt;</td></tr>' in page


def test_panels_without_a_metric_are_left_out() -> None:
    data = data_of(build_page([RUN, SECOND], "both"))
    titles = ["Reward", "Held-out accuracy", "Learner against sampler", "Phases", "Memory"]
    assert [panel["title"] for panel in data["panels"]] == titles
    assert data["panels"][3]["lines"] == {
        "timing_s/sample": "sample",
        "timing_s/prox": "prox",
        "timing_s/update": "update",
    }
    assert data["runs"][1]["series"]["reward/mean"] == [[1, 2, 3, 4], [0.1, 0.2, 0.3, None]]
    assert data["runs"][0]["samples"][0]["response"] == "1</script>2"
    assert data["metrics"]["reward/mean"] == "mean reward of the responses of a step"


def test_shares_of_unlike_sizes_have_axes_of_their_own() -> None:
    """Few codes change, and almost every update is below the grid: one axis would show two flat lines."""
    run = run_of("one", quant__codes_changed=[5e-4, 4e-3], quant__update_below_grid=[0.998, 0.991])
    panels = data_of(build_page([run], "one"))["panels"]
    assert [(list(panel["lines"]), panel["scale"]) for panel in panels] == [
        (["quant/codes_changed"], "linear"),
        (["quant/update_below_grid"], "linear"),
    ]


def test_long_runs_are_thinned() -> None:
    points = {step: float(step) for step in range(1, 3 * MAX_POINTS + 1)}
    samples = [{**ROW, "step": step, "reward": 1.0} for step in range(2 * MAX_SAMPLES)]
    run = PageRun("long", "", {"reward/mean": points}, [], {}, samples)
    (shown,) = data_of(build_page([run], "long"))["runs"]
    steps, values = shown["series"]["reward/mean"]
    assert len(steps) == MAX_POINTS + 1
    assert (steps[0], steps[-1], values[-1]) == (1, 3 * MAX_POINTS, 3.0 * MAX_POINTS)
    assert [row["step"] for row in shown["samples"]] == list(range(MAX_SAMPLES, 2 * MAX_SAMPLES))
    assert shown["older"] == MAX_SAMPLES
    assert shown["intervals"] == {"eval/pass@1": [], "eval/greedy": []}


LONG = {step: 0.0 for step in range(1, 3 * MAX_POINTS + 1)}
"""A run of which one of every 3 steps is shown: 1 and 2, 3 to 5, 6 to 8, ..."""


@pytest.mark.parametrize("name", ["mismatch/logp_abs_max", "actor/seq_ratio_max_dev_first_minibatch"])
@pytest.mark.parametrize("step", [1, 2, 3, 4, 5, 3 * MAX_POINTS - 1])
def test_a_thinned_run_hides_no_error(name: str, step: int) -> None:
    run = PageRun("long", "", {name: {**LONG, step: -1e-7, 7: 1e-9, 8: 2e-9}, "reward/mean": LONG}, [], {}, [])
    (shown,) = data_of(build_page([run], "long"))["runs"]
    errors = {at: value for at, value in zip(*shown["series"][name], strict=True) if value != 0}
    assert errors == {step: -1e-7, 8: 2e-9}
    assert shown["every"] == 3


@pytest.mark.parametrize("name", ["mismatch/logp_abs_max", "reward/mean"])
def test_a_thinned_run_hides_no_value_that_is_no_number(name: str) -> None:
    run = PageRun("long", "", {name: {**LONG, 3: 1.0, 4: math.nan, 8: math.inf, 6: 9.0}}, [], {}, [])
    (shown,) = data_of(build_page([run], "long"))["runs"]
    assert [at for at, value in zip(*shown["series"][name], strict=True) if value is None] == [4, 8]


def test_a_thinned_run_says_so_and_stacks_what_belongs_together(tmp_path: Path) -> None:
    series = {
        "mismatch/logp_abs_max": {**LONG, 3002: 1e-4},
        "timing_s/sample": {step: 2.0 for step in LONG},
        "timing_s/publish": {step: 1.0 for step in LONG if step % 2 == 0},
    }
    page = tmp_path / "report.html"
    page.write_text(build_page([PageRun("long", "", series, [], {}, [])], "long"))
    found = look(page, LOOK_AT_LONG)
    assert found["errors"] == []
    assert all("Of every 3 steps one is shown" in caption for caption in found["captions"])
    assert len(found["captions"]) == 2
    assert found["spikes"] == 1
    assert found["rows"] == [["long", "aligned, max", "3,002", "1.00e-4"]]
    assert found["stacked"] == [[2.0, 0], [2.0, 1.0]]  # of odd and of even steps


LOOK_AT_LONG = """
found.captions = [...document.querySelectorAll("#charts figcaption")].map((one) => one.textContent);
const [mismatch] = document.querySelectorAll("#charts figure");
const line = [...mismatch.querySelectorAll('path[stroke="#0072b2"]')].map((one) => one.getAttribute("d"));
const ys = line.sort((a, b) => b.length - a.length)[0].match(/-?[0-9.]+/g).map(Number).filter((_, i) => i % 2);
found.spikes = ys.filter((y) => y < Math.max(...ys)).length;
mismatch.querySelector("details").dispatchEvent(new Event("toggle"));
const rows = [...mismatch.querySelectorAll("tr")].map((row) => [...row.querySelectorAll("td")]);
found.rows = rows.map((cells) => cells.map((one) => one.textContent)).filter((row) => row.length && row[3] !== "0");
const names = ["timing_s/publish", "timing_s/sample"];
const [publish, sample] = names.map((name) => filled(data.runs[0], names, name));
found.stacked = [1, 0].map((odd) => [sample, publish].flatMap((part) => [
  ...new Set(part.filter(([step]) => step % 2 === odd).map(([, value]) => value)),
]));
"""


def test_the_interval_is_wilsons() -> None:
    """Against statsmodels' proportion_confint(45, 50, method="wilson") and (0, 20)."""
    assert wilson(0.9, 50) == pytest.approx([0.78640, 0.95652], abs=1e-4)
    assert wilson(0.0, 20) == pytest.approx([0.0, 0.16112], abs=1e-4)


def test_an_interval_is_of_as_many_prompts_as_its_evaluation_had() -> None:
    points = {"eval/pass@1": {0: 0.5, 12: 0.5, 24: 0.5}, "eval/num_prompts": {0: 100.0, 24: 25.0}}
    run = PageRun("goes on", "", points, [], {}, [])
    (shown,) = data_of(build_page([run], "one"))["runs"]
    assert shown["intervals"]["eval/pass@1"] == [[0, *wilson(0.5, 100)], [24, *wilson(0.5, 25)]]


SCRIPT = Path(__file__).with_name("in_browser.js").read_text()


def test_a_browser_draws_the_curves_and_filters_the_samples(tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    page.write_text(build_page([RUN], "first"))
    found = look(page, SCRIPT)
    assert found["errors"] == []
    titles = ["Reward", "Held-out accuracy", "Learner against sampler", "Phases", "Mismatch by part", "Who works when"]
    assert found["titles"] == titles
    assert found["labels"][0].startswith("Reward. ")
    assert "reward: 0.2 at step 1, 0.7 at step 4" in found["labels"][0]
    a, b, c, d = found["first"]
    assert ((b - c) / (a - b), (d - c) / (a - b)) == pytest.approx((2.0, 0.5), abs=0.02)  # y grows downwards
    assert found["bars"][0] >= 4
    assert found["labels"][-1] == "driver; rank 0, idle 75%."
    assert found["parts"] == ["learner: engine", "format: kernel", "rounding: rope"]
    assert found["zeros"] == 2  # of the axis, and beside the bar that is exactly 0
    none, kernel, rope = found["gaps"]  # on the page's scale, on which 0 has a place
    assert none == pytest.approx(0.0, abs=0.5)
    assert kernel / rope == pytest.approx(math.log10(1 + 1e4) / math.log10(1 + 1e2), rel=0.02)
    assert found["gapLabel"].endswith(
        "w8a8_int8 bfloat16 8 tokens, format, kernel: 1.00e-4; w8a8_int8 bfloat16 8 tokens, rounding, rope: 1.00e-6"
    )
    assert found["gapRow"] == ["w8a8_int8 bfloat16 8 tokens", "format", "kernel", *["1.00e-4"] * 6]
    assert found["workRow"] == ["rank 0, idle 75%", "update", "1.5", "2"]
    assert found["work"] == pytest.approx(3.0, abs=0.1)  # times as long as the update
    assert not found["wide"]
    assert found["all"] == ["4 samples, page 1 of 1"]
    assert found["tokens"] == ["1", "</script>", "2"]
    assert found["facts"] == ["step 2 · reward 0 · staleness 0.25"]
    assert found["likely"] == "log-prob -3, error token"
    assert found["filtered"] == ["1 samples, page 1 of 1"]
    assert found["ratio"] == "ratio 2, error token"
    assert found["none"] == ["No sample matches."]
    assert (found["table"], found["error"]) == (["bad"], ["ad"])
    assert found["any"] == ["mismatch/logp_abs_max"]
    assert found["values"] == ["first", "reward", "2", "0.4"]
    assert (found["theme"], found["after"]) == ("light", "dark")
    assert found["unnamed"] == 0
    assert not found["choice"]  # of the one run


def test_two_runs_share_a_chart_on_a_dark_narrow_screen(tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    page.write_text(build_page([RUN, SECOND], "both"))
    found = look(page, SCRIPT, 420, dark=True)
    assert found["errors"] == []
    assert found["theme"] == "dark"
    assert found["choice"]
    assert found["runs"] == ["first", "second"]
    titles = ["Reward", "Held-out accuracy", "Learner against sampler", "Phases: first"]
    titles += ["Memory: second", "Mismatch by part: first", "Who works when: first"]
    assert found["titles"] == titles
    assert len(found["first"]) == 4
    assert len(found["second"]) == 3  # the infinite value is left out
    assert "second, reward: 0.1 at step 1, - at step 4" in found["labels"][0]
    assert not found["wide"]


def test_the_page_says_where_samples_and_responses_go_on(tmp_path: Path) -> None:
    ids = [i % 10 for i in range(MAX_TOKENS + 1024)]
    values = [-0.1] * len(ids)
    row = {**ROW, "token_ids": ids, "token_logprobs": values, "token_ratios": values, "token_errors": [1] * len(ids)}
    row |= {"step": 1, "response": "".join(map(str, ids))}
    shown = with_tokens(row, lambda ids: "".join(map(str, ids)))
    page = tmp_path / "report.html"
    page.write_text(build_page([replace(RUN, samples=[shown] * 600)], "first"))
    found = look(page, LOOK_AT_ENDS)
    assert found["errors"] == []
    assert found["texts"] == [row["response"]] * 4
    assert found["count"] == "195 samples, page 1 of 20 (405 older ones are in samples.jsonl alone)"
    assert found["spans"] == MAX_TOKENS + 1
    assert found["rest"] == ["the rest of the response: no values of its tokens were kept", "", "rest"]


LOOK_AT_ENDS = """
const shownIn = (mode) => {
  filters.colour.value = mode;
  filters.colour.dispatchEvent(new Event("input", { bubbles: true }));
  return document.querySelector(".sample .response");
};
found.texts = ["none", "ratio", "error", "logprob"].map((mode) => shownIn(mode).textContent);
found.count = byId("count").textContent;
const spans = document.querySelectorAll(".sample:first-child .response span");
const { title, style, className } = [...spans].at(-1);
found.spans = spans.length;
found.rest = [title, style.backgroundColor, className];
"""

CONTROLS = "button:not(:disabled), select, input, summary, .keys, .response, a[href]:not([hidden])"
STOP = """(() => {
  const one = document.activeElement, style = getComputedStyle(one);
  if (one === document.body) return null;
  one.dataset.reached = "yes";
  return [one.outerHTML.slice(0, 99), style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2];
})()"""


def test_every_control_is_reached_by_tab_shows_its_focus_and_has_a_name(tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    page.write_text(build_page([RUN], "first"))
    with Keyboard(page) as keyboard:
        stops = []
        keyboard.press("Tab")
        while stop := keyboard.ask(STOP):
            stops.append(stop)
            keyboard.press("Tab")
        missed = (
            "filter((one) => !one.dataset.reached && one.checkVisibility()).map((one) => one.outerHTML.slice(0, 99))"
        )
        assert keyboard.ask(f"[...document.querySelectorAll('{CONTROLS}')].{missed}") == []
        assert len(stops) >= 20
        assert [html for html, shows in stops if not shows] == []
        nodes = keyboard.call("Accessibility.getFullAXTree")["nodes"]
    focusable = [
        node
        for node in nodes
        if any(p["name"] == "focusable" and p["value"]["value"] for p in node.get("properties", []))
    ]
    assert len(focusable) >= 20
    roles = {node["role"]["value"] for node in focusable if not node.get("name", {}).get("value")}
    assert roles <= {"RootWebArea", "generic"}  # the page itself, and boxes that scroll


def test_keys_do_what_the_mouse_does(tmp_path: Path) -> None:
    samples = [{**ROW, "step": 4, "reward": 1.0} for _ in range(11)]
    page = tmp_path / "report.html"
    gaps = {**RUN.series["mismatch/logp_abs_max"], 5: math.nan}
    run = replace(RUN, samples=samples, series={**RUN.series, "mismatch/logp_abs_max": gaps})
    page.write_text(build_page([run], "first"))
    said = "document.activeElement.parentElement.querySelector('.said').textContent"
    with Keyboard(page) as keyboard:
        keyboard.tab_to("one.id === 'theme'")
        keyboard.press(" ")
        assert keyboard.ask("document.documentElement.dataset.theme") == "dark"
        keyboard.tab_to("one.ariaLabel?.startsWith('Learner against sampler')")
        line = "document.activeElement.querySelectorAll('path[stroke=\"#0072b2\"][fill=none]').length"
        keyboard.until(f"{line} > 0")
        keyboard.press("ArrowRight", "ArrowRight", "ArrowRight")
        assert keyboard.ask(said) == "Step 3: aligned, max 1.00e-4"
        keyboard.press("End")
        assert keyboard.ask(said) == "Step 5: aligned, max -"  # not a number, and never 0
        keyboard.press("ArrowLeft", "Home")
        assert keyboard.ask(said) == "Step 1: aligned, max 0"
        keyboard.press("1")
        assert keyboard.ask(said) == "aligned, max: hidden"
        keyboard.until(f"{line} === 0")
        keyboard.press("1")
        assert keyboard.ask(said) == "aligned, max: shown"
        keyboard.until(f"{line} > 0")
        ticks = "document.activeElement.textContent"
        whole = keyboard.ask(ticks)
        keyboard.press("+")
        assert keyboard.ask(said) == "Zoomed to 50% of the steps"
        keyboard.until(f"{ticks} !== {json.dumps(whole)}")
        keyboard.press("Escape")
        assert keyboard.ask(said) == ""
        keyboard.until(f"{ticks} === {json.dumps(whole)}")
        keyboard.tab_to("one.tagName === 'SUMMARY'")
        keyboard.press("Enter")
        keyboard.until("document.activeElement.parentElement.querySelectorAll('td').length === 20")
        keyboard.tab_to("one.name === 'colour'")
        keyboard.press("ArrowDown")
        assert keyboard.ask("document.activeElement.value") == "ratio"
        keyboard.tab_to("one.className === 'response'")
        keyboard.press("ArrowRight", "ArrowRight")
        assert keyboard.ask(said) == 'Token 2 of 3, "</script>": ratio 2, error token'
        keyboard.tab_to("one.id === 'next'")
        keyboard.press("Enter")
        assert keyboard.ask("document.getElementById('count').textContent") == "11 samples, page 2 of 2"
        assert keyboard.ask("document.activeElement.id") == "previous"  # the last page has no next one

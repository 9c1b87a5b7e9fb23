import re
from pathlib import Path

import pytest

from launch.run.page.panels import PANELS, PHASES, with_rest

ROOT = Path(__file__).parents[5]


def test_the_panel_of_phases_has_all_that_a_step_times() -> None:
    sources = "".join((ROOT / "trainer" / name).read_text() for name in ("loop.py", "collect.py"))
    assert set(PHASES) == set(re.findall(r'\btimer\("(\w+)"\)', sources))
    (panel,) = [panel for panel in PANELS if panel.title == "Phases"]
    assert set(panel.lines.values()) == {name.replace("_", " ") for name in (*PHASES, "other")}


def test_the_rest_of_a_step_is_what_no_phase_took() -> None:
    series = {"timing_s/step": {1: 5.0, 2: 1.0}, "timing_s/sleep": {1: 1.0}, "timing_s/sample": {1: 2.5, 2: 1.0 + 1e-9}}
    found = with_rest(series)
    assert found.pop("timing_s/other") == pytest.approx({1: 1.5, 2: 0.0}, abs=0)
    assert found == series
    assert with_rest({"reward/mean": {1: 0.5}}) == {"reward/mean": {1: 0.5}}

import math
import re
from pathlib import Path

import pytest

from launch.run.gaps import GAPS_FILE, Cell, Gap, read_gaps, write_gaps
from launch.run.report import write_page
from qarl.errors import DataError

CELL = Cell(
    "m", "w8a8_int8", "bfloat16", ["Kernel"], 8, 2, -1.5, [Gap("format", "kernel", {"logp_abs_mean": math.inf})]
)


def test_what_was_measured_is_read_again(tmp_path: Path) -> None:
    write_gaps(tmp_path / GAPS_FILE, [CELL])
    assert read_gaps(tmp_path / GAPS_FILE) == [CELL]
    assert read_gaps(tmp_path / "nowhere") == []


@pytest.mark.parametrize("text", ["", "{}", '[{"model": "m"}]'])
def test_another_file_is_told(tmp_path: Path, text: str) -> None:
    (tmp_path / GAPS_FILE).write_text(text)
    with pytest.raises(DataError, match=r"mismatch\.json: not what `qarl mismatch` writes; delete it"):
        read_gaps(tmp_path / GAPS_FILE)


def test_the_page_of_a_run_has_what_lies_in_its_folder(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "reward/mean": 0.5}\n')
    metrics = {"logp_abs_mean": 0.25, "logp_abs_max": 1.0, "q1_logp_abs_mean": 0.125}
    found = []
    for cells in ([], [Cell("m", "none", "float32", [], 8, 2, -1.5, [Gap("rounding", "rope", metrics)], 7)]):
        if cells:
            write_gaps(tmp_path / GAPS_FILE, cells)
        write_page([tmp_path], tmp_path / "page.html", [None])
        found += re.findall(r'"gaps":(\[.*?\])}', (tmp_path / "page.html").read_text())
    assert found == [
        "[]",
        '[{"title":"none float32 8 tokens","steps":7,"rows":[["rounding","rope",0.25,1.0,0.125,null,null,null]]',
    ]

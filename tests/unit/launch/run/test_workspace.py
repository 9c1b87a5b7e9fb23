import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from launch.cli import main
from launch.run.metric_table import rows
from launch.run.workspace import make_workspace, save
from qarl.config.io import to_yaml, validate
from qarl.errors import ResourceError

TREE = {"model": {"path": "m"}, "task": {"kind": "sorting"}, "tracking": {"wandb_project": "p"}}
CONFIG = validate(TREE, "test")
NAMES = ["response_length/max", "reward/mean", "mismatch/q1_k3_kl", "mismatch/k3_kl", "mine/own", "eval/pass@1"]


def sections(model: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    bank = model["spec"]["section"]["panel_bank_config"]["sections"]
    return {section["name"]: section["panels"] for section in bank if section["panels"]}


def test_the_workspace_has_a_panel_for_each_metric_by_section(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, **dict.fromkeys(NAMES, 0.5)}) + "\n")
    (tmp_path / "samples.jsonl").write_text(json.dumps({"step": 1, "table": "samples"}) + '\n{"step": 2}\n')
    (tmp_path / "config.yaml").write_text(to_yaml(CONFIG))
    file = tmp_path / "workspace.json"
    assert main(["dashboard", str(tmp_path), "--entity", "team", "--json", str(file)]) == 0
    model = json.loads(file.read_text())
    assert (model["entity"], model["project"]) == ("team", "p")
    found = sections(model)
    assert list(found) == ["compare runs", "reward", "eval", "mismatch", "other", "samples"]
    assert found["compare runs"][-1]["view_type"] == "Run Comparer"
    (plot, meanings) = found["mismatch"]
    assert plot["config"]["metrics"] == ["mismatch/k3_kl", "mismatch/q1_k3_kl"]
    axes = [plot["config"][key] for key in ("chart_title", "x_axis", "y_axis_title")]
    assert axes == ["mismatch/*k3_kl", "step", "nats"]
    titles = [panel["config"].get("chart_title") for panel in found["reward"]]
    assert titles == ["reward/mean", "response_length/max", None]  # in the order of the table of metrics
    assert "k3" in meanings["config"]["value"]
    assert "logp_abs_max" not in meanings["config"]["value"]  # the run does not log it
    assert [panel["view_type"] for panel in found["samples"]] == ["Weave"]


def test_every_metric_of_the_table_but_histograms_has_a_panel(tmp_path: Path) -> None:
    units = {row.name.replace("[1-4]", "1").replace("*", "x"): row.unit for row in rows()}
    histograms = {name for name, unit in units.items() if unit == "histogram"}
    logged = {name: {"edges": [0.0, 1.0], "counts": [3]} if name in histograms else 0.5 for name in units}
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, **logged}) + "\n")
    (tmp_path / "config.yaml").write_text(to_yaml(CONFIG))
    assert main(["dashboard", str(tmp_path), "--json", str(tmp_path / "workspace.json")]) == 0
    found = sections(json.loads((tmp_path / "workspace.json").read_text()))
    del found["compare runs"]
    drawn = [name for panels in found.values() for panel in panels for name in panel["config"].get("metrics") or ()]
    assert sorted(drawn) == sorted(units.keys() - histograms)
    assert histograms == {"actor/seq_mismatch_weight_hist"}


class Refuses(BaseHTTPRequestHandler):
    """W&B's API: knows the user, and refuses to save a view."""

    def do_POST(self) -> None:
        query = self.rfile.read(int(self.headers["Content-Length"])).decode()
        user: dict[str, Any] = {"data": {"viewer": {"id": "u", "entity": "me", "username": "me", "flags": "{}"}}}
        refused = {"data": None, "errors": [{"message": "entity team\nnot found"}]}
        answer = json.dumps(refused if "UpsertView" in query else user).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def refusing(offline_wandb: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Refuses) as server:
        Thread(target=server.serve_forever).start()
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
        yield
        server.shutdown()


@pytest.mark.usefixtures("refusing")
def test_a_workspace_that_wandb_refuses_is_one_line() -> None:
    """W&B's own client and service, up to the answer of a server."""
    with pytest.raises(ResourceError, match=r"W&B did not save the workspace: .*entity team not found; check --entity"):
        save(make_workspace("team", "p", NAMES, ["samples"]))

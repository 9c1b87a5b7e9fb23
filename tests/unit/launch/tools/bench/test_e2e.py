"""`qarl bench e2e` around runs that write what real ones would."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from launch.cli import main
from launch.demo.tiny_model import make_tokenizer
from launch.tools.bench import e2e
from qarl.config.shipped import config_path
from qarl.errors import QarlError
from tests.support.numerics_models import tiny_model


@pytest.fixture
def config_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The quickstart with a random model, in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    tiny_model("qwen3").save_pretrained(tmp_path / "model")
    make_tokenizer(32).save_pretrained(tmp_path / "model")
    path = tmp_path / "tiny.yaml"
    path.write_text(f"inherits: {config_path('quickstart').resolve()}\nmodel: {{path: {tmp_path}/model}}\n")
    return path


def bench(config_file: Path, monkeypatch: pytest.MonkeyPatch, trl_tokens: int) -> int:
    """`qarl bench e2e` of steps of 2048 tokens by qarl and `trl_tokens` by TRL."""

    def run(command: Sequence[str], log: Path) -> int:
        seconds = [100.0, 2.0, 3.0, 4.0]
        if "train" in command:
            assert "rollout.sampling.ignore_eos=true" in command
            rows = [{"step": 0, "eval/pass@1": 0.5}]
            rows += [{"timing_s/step": s, "timing_s/sample": s / 2, "response_length/mean": 8.0} for s in seconds]
            folder = Path("runs", "bench-e2e")
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
            return 2**30
        work = json.loads(Path(command[-1]).read_text())
        assert (work["rollouts"], work["minibatches"], work["steps"], work["max_new_tokens"]) == (256, 4, 4, 14)
        assert work["prompts"][0]["ids"][0] == 1  # what `tokenizer` makes of the text, beginning included
        lines = [e2e.MARK + json.dumps({"step": 2 * s, "sample": s, "tokens": trl_tokens}) for s in seconds]
        log.write_text("\n".join(["Loading weights", *lines]))
        return 2**31

    e2e.FOLDER.mkdir(parents=True)
    monkeypatch.setattr(e2e, "run", run)
    monkeypatch.setattr(e2e, "trl_environment", lambda: Path("python"))
    return main(["bench", "e2e", "--configs", str(config_file), "--steps", "3", "--rounds", "1"])


def test_rows_are_the_medians_without_the_first_step(
    config_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench(config_file, monkeypatch, trl_tokens=2048) == 0
    out = capsys.readouterr().out
    assert f"| {config_file} | qarl | 3.00 (2.00) | 1.50 (2.00) | 1.50 (2.00) | 2048 | 1.00 (2.00) |" in out
    assert f"| {config_file} | TRL | 6.00 (1.00) | 3.00 (1.00) | 3.00 (1.00) | 2048 | 2.00 (1.00) |" in out
    assert "2.00 times TRL's speed (2.00 to 2.00)" in out


def test_other_numbers_of_tokens_are_an_error_after_the_rows(
    config_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench(config_file, monkeypatch, trl_tokens=2047) == 1
    out, err = capsys.readouterr()
    assert "| TRL | 6.00 (1.00) | 3.00 (1.00) | 3.00 (1.00) | 2047 |" in out
    assert "qarl sampled [2048, 2048, 2048] tokens in its steps, TRL [2047, 2047, 2047]" in err
    assert "times TRL's speed" not in out


def test_a_failed_run_names_its_log_and_its_last_line(tmp_path: Path) -> None:
    log = tmp_path / "run.log"
    with pytest.raises(QarlError, match=r"run\.log: exited with code 3: no such model"):
        e2e.run([sys.executable, "-c", "print('no such model'); raise SystemExit(3)"], log)


def test_memory_is_that_of_all_processes(tmp_path: Path) -> None:
    """A child holds 200 MB for two looks; the parent only waits for it."""
    child = "import time; data = bytearray(b'1') * 200_000_000; time.sleep(2.5)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    assert e2e.run([sys.executable, "-c", parent], tmp_path / "log") > 200_000_000

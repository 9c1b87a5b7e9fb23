"""The command line: what is wrong is said in one line, with exit code 2, before anything is started."""

from __future__ import annotations

import argparse
import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from configs import __file__ as configs_init
from launch.arguments import path, path_text
from launch.cli import COMMANDS, _parser, main
from launch.commands import train as train_command
from launch.demo.tiny_model import make_tokenizer
from qarl.config.io import documentation, load_config, validate
from qarl.config.run import Config
from qarl.config.shipped import config_path
from qarl.errors import AGAIN, ConfigError, RolloutError

pytestmark = pytest.mark.usefixtures("as_from_a_shell")
SHIPPED = Path(configs_init).parent
LIGHT = ["rollout.num_cpus_per_worker=0.1", "learner.num_cpus_per_rank=0.1"]
"""So that the checks of the machine pass on any machine."""


Fail = Callable[..., str]


@pytest.fixture
def fail(capsys: pytest.CaptureFixture[str]) -> Fail:
    """Runs a command that must fail with exit code 2; returns its one line on stderr."""

    def run(*argv: str) -> str:
        capsys.readouterr()
        assert main(argv) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith("qarl: ")
        assert not Path("runs").exists()  # nothing was started
        return line

    return run


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    """A model of one layer."""
    path = tmp_path / "model"
    make_tokenizer(64).save_pretrained(path)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = AutoConfig.for_model("qwen3", num_hidden_layers=1, vocab_size=64, head_dim=32, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return path


def make_config(**sections: dict[str, Any]) -> Config:
    tree: dict[str, Any] = {"model": {"path": "none"}, "task": {"kind": "sorting"}}
    return validate(tree | sections, "test")


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["quickstart", "train.stepz=3"], ["'train.stepz'", "did you mean 'train.steps'?"]),
        (["quickstart", "train.steps=many"], ["train.steps", "valid integer", "'many'"]),
        (["quickstart", "train.steps"], ["override 'train.steps' is not key=value"]),
        (["quickstart", "train.steps=[1,"], ["override 'train.steps=[1,'", "not YAML"]),
        (["quickstart", "train.group_size=1"], ["train.group_size", "use 2 or more"]),
        (["quickstart", "learner.minibatches=33"], ["learner.minibatches", "train.prompts_per_step is 32"]),
        (["no_such_config"], ["no_such_config: no such config file", "qarl config list"]),
        (["here/nothing.yaml"], ["here/nothing.yaml: no such config file"]),
        (["seed=3", "quickstart"], ["seed=3: no such config file", "the config comes first"]),
    ],
)
@pytest.mark.parametrize("command", [["train"], ["config", "show"]], ids=" ".join)
def test_a_bad_config_is_one_line(fail: Fail, command: list[str], argv: list[str], words: list[str]) -> None:
    line = fail(*command, *argv)
    assert all(word in line for word in words)


def test_a_model_path_where_nothing_is(fail: Fail) -> None:
    line = fail("train", "quickstart", *LIGHT, "model.path=nowhere", "model.build=null")
    assert line.startswith("qarl: nowhere: no such model directory; ")
    assert "set model.build={}" in line


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_model_path_that_is_no_model(fail: Fail, model_dir: Path, missing: str) -> None:
    (model_dir / missing).unlink()
    assert f"{model_dir}: holds no " in fail("train", "quickstart", *LIGHT, f"model.path={model_dir}")


GOOD_ROW = '{"question": "1+1?", "answer": "2"}'


@pytest.mark.parametrize(
    ("train_rows", "where", "reason"),
    [
        ("", "train.jsonl", "has no rows"),
        (None, "train.jsonl", "cannot read: No such file or directory"),
        (f'{GOOD_ROW}\n{{"question": "1+2?"', "train.jsonl:2", "not a JSON row"),
        (f'{GOOD_ROW}\n\n{{"question": "1+2?"}}', "train.jsonl:3", "no key 'answer'"),
        ('{"question": 3, "answer": "3"}', "train.jsonl:1", "'question' is int, not text"),
        ('{"question": "2+2?", "answer": "4"}', "train.jsonl", "every question is also in"),
        (GOOD_ROW, "task.chat", "the tokenizer has no chat template"),
    ],
)
def test_bad_data_names_file_and_line(
    fail: Fail, model_dir: Path, train_rows: str | None, where: str, reason: str
) -> None:
    if train_rows is not None:
        Path("train.jsonl").write_text(train_rows)
    Path("heldout.jsonl").write_text('{"question": "2+2?", "answer": "4"}')
    assert reason in (line := fail("train", dataset_config(model_dir, chat=where == "task.chat"), *LIGHT))
    assert line.startswith(f"qarl: {where}: ")


def test_prompts_that_do_not_fit(fail: Fail, model_dir: Path) -> None:
    Path("train.jsonl").write_text(GOOD_ROW)
    Path("heldout.jsonl").write_text('{"question": "2+2?", "answer": "4"}')
    room = ["rollout.max_model_len=10", "rollout.sampling.max_new_tokens=8"]
    line = fail("train", dataset_config(model_dir, chat=False), *LIGHT, *room)
    assert line == "qarl: no training prompt fits in 2 tokens; raise rollout.max_model_len"


def dataset_config(model_dir: Path, chat: bool) -> str:
    task = {"kind": "dataset", "train_path": "train.jsonl", "heldout_path": "heldout.jsonl", "chat": chat}
    Path("c.yaml").write_text(json.dumps({"model": {"path": str(model_dir)}, "task": task}))
    return "c.yaml"


def test_more_gpus_than_there_are(fail: Fail) -> None:
    line = fail(
        "train", "quickstart", *LIGHT, "cluster.device=cuda", "rollout.num_workers=999", "cluster.colocate=false"
    )
    assert "999 rollout workers and 1 learner ranks request 1000 GPUs, " in line
    assert "cluster.colocate=true" in line


def test_two_workers_on_one_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "quickstart", *LIGHT, "cluster.device=cuda", "rollout.num_workers=2"]) == 2
    assert "only one rollout worker and one learner rank can share a GPU" in capsys.readouterr().err


def test_a_cluster_that_does_not_answer(fail: Fail) -> None:
    line = fail("train", "quickstart", *LIGHT, "cluster.address=127.0.0.1:1")
    assert line.startswith("qarl: cluster.address: no Ray cluster answers at 127.0.0.1:1 (")


def test_more_cpus_than_there_are(fail: Fail) -> None:
    line = fail(
        "train", "quickstart", "cluster.device=cpu", "rollout.num_workers=1", "rollout.num_cpus_per_worker=9999"
    )
    assert "request 9999.5 CPUs, " in line


# --- how main ends ---------------------------------------------------------------------------------------------------


def raising(error: BaseException) -> Callable[[object], None]:
    def run(_: object) -> None:
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (RolloutError("all dead", "fleet"), 1, "qarl: fleet: all dead"),
        (ConfigError("bad"), 2, "qarl: bad"),
        (KeyboardInterrupt(), 130, f"qarl: interrupted; {AGAIN}"),
    ],
)
def test_exit_codes(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
    line: str,
) -> None:
    monkeypatch.setattr(train_command, "run", raising(error))
    assert main(["train", "quickstart"]) == code
    assert capsys.readouterr().err == f"{line}\n"


@pytest.mark.parametrize(("cause", "code"), [(RolloutError("all dead"), 1), (KeyboardInterrupt(), 130)])
def test_a_signal_that_arises_in_a_c_extension(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], cause: BaseException, code: int
) -> None:
    error = SystemError("<built-in method __new__> returned a result with an exception set")
    error.__cause__ = SystemError("<built-in function exception> returned a result with an exception set")
    error.__cause__.__cause__ = cause
    monkeypatch.setattr(train_command, "run", raising(error))
    assert main(["train", "quickstart"]) == code
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_an_interrupted_dry_run_promises_no_checkpoint(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train_command, "run", raising(KeyboardInterrupt()))
    assert main(["train", "quickstart", "--dry-run"]) == 130
    assert capsys.readouterr().err == "qarl: interrupted\n"


def test_a_traceback_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QARL_TRACEBACK", "1")
    with pytest.raises(ConfigError):
        main(["config", "show", "no_such_config"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_interrupt(monkeypatch: pytest.MonkeyPatch, number: signal.Signals) -> None:
    # A shell lets what it starts in the background ignore SIGINT, and nohup SIGHUP.
    signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    monkeypatch.setattr(train_command, "run", lambda _: signal.raise_signal(number))
    assert main(["train", "quickstart"]) == 130
    signal.raise_signal(number)  # a second one does not cut the end short


def test_a_signal_that_nohup_ignores_does_not_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    monkeypatch.setattr(train_command, "run", lambda _: signal.raise_signal(signal.SIGHUP) or 0)
    assert main(["train", "quickstart"]) == 0


@pytest.mark.parametrize("argv", [[], ["fly"], ["train"], ["config"]])
def test_unknown_commands_exit_with_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
    assert "qarl" in capsys.readouterr().err


# --- config commands -------------------------------------------------------------------------------------------------


def test_config_list_introduces_every_shipped_config(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "list"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert lines.keys() == {path.relative_to(SHIPPED).with_suffix("").as_posix() for path in SHIPPED.glob("**/*.yaml")}
    assert all(len(line.split(maxsplit=1)[1]) > 20 and "#" not in line for line in lines.values())


def test_config_show_is_a_config(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "show", "quickstart", "seed=3"]) == 0
    shown = capsys.readouterr().out
    assert yaml.safe_load(shown)["model"]["path"] == "runs/models/sorter-seed3"
    Path("shown.yaml").write_text(shown)
    assert load_config("shown.yaml") == load_config(SHIPPED / "quickstart.yaml", ["seed=3"])


def test_config_keys_explains_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "keys"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = list(documentation())
    assert [line.partition(" = ")[0] for line in lines[::2]] == [key for key, _, _ in rows]
    assert [line.strip() for line in lines[1::2]] == [description for _, _, description in rows]


def test_config_path_prefers_files(tmp_path: Path) -> None:
    assert config_path("quickstart") == SHIPPED / "quickstart.yaml"
    assert config_path("mine.yaml") == Path("mine.yaml")
    assert config_path("/data/mine") == Path("/data/mine")  # as it was typed: no such config
    (tmp_path / "quickstart").touch()
    assert config_path("quickstart") == Path("quickstart")


def test_a_config_inherits_a_shipped_one_by_name(fail: Fail) -> None:
    Path("mine.yaml").write_text("inherits: quickstart\nseed: 5\n")
    assert load_config("mine.yaml") == load_config(SHIPPED / "quickstart.yaml", ["seed=5"])
    Path("mine.yaml").write_text("inherits: quickstartt\n")
    assert "quickstartt: no such config file" in fail("train", "mine.yaml")


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("reward={kind: custom, function: 'mine.py:nothing'}", "reward.function: mine.py has no attribute 'nothing'"),
        ("reward={kind: custom, function: 'mine.py:judge', kwargs: {b: 1}}", "reward.function: judge cannot be called"),
        ("reward={kind: custom, function: 'none.py:judge'}", "reward.function: no such file: none.py"),
        ("tracking.trackers=[jsonl, 'mine.py:judge']", "tracking.trackers: judge cannot be called as judge("),
        ("tracking.trackers=[jsonl, nothing]", "tracking.trackers: 'nothing' names no function"),
    ],
)
def test_functions_of_the_user_are_checked_before_a_run(fail: Fail, override: str, line: str) -> None:
    Path("mine.py").write_text("def judge(text, finish_reason, answer): return 1.0")
    assert line in fail("train", "quickstart", *LIGHT, override)


def test_all_faults_are_told_at_once_with_a_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    trackers = "tracking.trackers=[jsonl, nothing]"
    wrong = ["rollout.batch_invariant=true", "rollout.transport=nccl", "rollout.kv_cache_gib=99999", trackers]
    assert main(["train", "quickstart", "cluster.device=cpu", "rollout.scheme=w8a8_int8", *wrong]) == 2
    lines = capsys.readouterr().err.splitlines()
    keys = ["rollout.batch_invariant", "rollout.transport", "rollout.kv_cache_gib", "tracking.trackers"]
    assert [line.startswith(f"qarl: {key}") for line, key in zip(lines, keys, strict=True)] == [True] * 4
    assert not Path("runs").exists()


@pytest.mark.parametrize("place", [0, 1, 2, 3])
def test_an_option_stands_anywhere_among_the_overrides(place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[argparse.Namespace] = []
    monkeypatch.setattr("launch.commands.train.run", lambda args: found.append(args) or 0)
    words = ["quickstart", "seed=1", "train.steps=2"]
    words.insert(place, "--dry-run")
    assert main(["train", *words]) == 0
    assert (found[0].dry_run, found[0].config, found[0].overrides) == (True, "quickstart", ["seed=1", "train.steps=2"])


@pytest.mark.parametrize("words", [["quickstart", "--dry-run", "seed=1", "--steps"], ["quickstart", "--dryrun"]])
def test_unknown_options_are_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", *words])
    assert f"unrecognized arguments: {words[-1]}" in capsys.readouterr().err.replace("seed=1 ", "")


@pytest.mark.parametrize(
    ("argv", "command", "unknown"),
    [
        (["trace", "a", "b"], "qarl trace", "b"),
        (["runs", "--jsn"], "qarl runs", "--jsn"),
        (["config", "keys", "x"], "qarl config keys", "x"),
        (["bench", "pool", "x"], "qarl bench pool", "x"),
        (["train", "quickstart", "--steps", "5"], "qarl train", "--steps 5; settings are key=value, such as"),
        (["--dry-run", "train", "quickstart"], "qarl", "--dry-run\n"),
    ],
)
def test_a_command_tells_of_what_it_does_not_know_with_its_own_usage(
    argv: list[str], command: str, unknown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(argv)
    error = capsys.readouterr().err
    assert error.startswith(f"usage: {command} [-h]")
    assert f"{command}: error: unrecognized arguments: {unknown}" in error


def test_settings_are_not_required(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["train"])
    assert capsys.readouterr().err.endswith("the following arguments are required: config\n")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_says_what_it_does_and_gives_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert f"\nexamples:\n  qarl {command}" in text
    sentence = text.split("\n\n")[1]
    assert sentence[0].isupper()
    assert sentence.endswith(".")


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from launch.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\nprint(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=SHIPPED.parent, capture_output=True, text=True, timeout=60)
    assert not {"torch", "ray", "pydantic", "omegaconf"} & set(done.stdout.split())


WITHOUT_TORCH = """
import json, subprocess, sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from launch.cli import main

for name in ("torch", "transformers", "ray", "vllm", "deepspeed", "wandb", "datasets"):
    sys.modules[name] = None  # importing it fails
subprocess.Popen = None  # nothing is started
answers = []
for argv in json.loads(sys.argv[1]):
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()) as err:
        try:
            code = main(argv)
        except SystemExit as error:
            code = error.code
        except ImportError as error:
            code = f"late: {error}"
    answers.append([code, err.getvalue()])
print(json.dumps(answers))
"""
EARLY = {
    "train c.yaml model.path=nowhere": "nowhere: no such model directory; download a model there",
    "train c.yaml model.path=c.yaml": "c.yaml: not a directory",
    "train c.yaml --dry-run model.path=model task.train_path=nowhere.jsonl": "nowhere.jsonl: cannot read: No such file",
    "train quickstart run.dir=c.yaml": "c.yaml: is no folder that you may write; change run.dir or run.name",
    "train quickstart task.levels=[2,2]": "task.levels: [2, 2] names a level twice",
    "chaos c.yaml model.path=nowhere": "nowhere: no such model directory",
    "chaos quickstart --folder here": "--folder here: holds something else than a campaign",
    "submit c.yaml model.path=nowhere --address http://127.0.0.1:1": "nowhere: no such model directory",
    "submit quickstart --address nonsense": "'nonsense' is not a dashboard address",
    "plan c.yaml model.path=nowhere": "nowhere: no such model directory; download a model there; `qarl plan` needs its",
    "plan quickstart --device h9000": "argument --device: invalid choice: 'h9000' (choose from 'cpu', 'a100'",
    "plan quickstart --response-tokens 15": "--response-tokens: 15 exceeds rollout.sampling.max_new_tokens 14",
    "plan quickstart --prompt-tokens 51": "--prompt-tokens: 51 exceeds the 50",
    "simulate c.yaml model.path=nowhere": "nowhere: no such model directory",
    "simulate quickstart --device h9000": "argument --device: invalid choice: 'h9000'",
    "simulate quickstart --response-tokens 15": "--response-tokens: 15 exceeds rollout.sampling.max_new_tokens 14",
    "simulate quickstart --prompt-tokens 51": "--prompt-tokens: 51 exceeds the 50",
    "simulate quickstart --devices 1": "--devices: a worker and a rank need a device each",
    "simulate quickstart --from here": "here: is no folder of a run",
    "eval nowhere": "nowhere: no such config file",
    "eval runs/nowhere": "runs/nowhere: no such config file",
    "mismatch runs/nowhere": "runs/nowhere: no such config file",
    "eval here": "here: no such config file; it is a folder, and not of a run",
    "eval quickstart --model nowhere": "nowhere: no such model directory",
    "eval quickstart --model here": "here: holds no config.json",
    "eval run --max-new-tokens 64": "run: the run has no final model",
    "eval run --model model --max-new-tokens 64": "--max-new-tokens: 64 leaves no room for a prompt",
    "export nowhere out": "nowhere: is no folder of a run",
    "export run here": "here exists; name a new folder",
    "export run out": "run: the run has no checkpoint yet",
    "report nowhere": "nowhere: is no folder of a run",
    "report here --out here": "argument --out: here is a folder; name a file",
    "trace here --out c.yaml/x": "c.yaml is no folder; name another file",
    "report here": "here: is no folder of a run",
    "report run": "run/metrics.jsonl: no metrics",
    "trace here": "here: is no folder of a run",
    "trace run": "run/logs: no process has logged what it did; the run has done nothing yet",
    "compare run": "run: is one run alone; name the runs to compare it with",
    "compare nowhere run": "nowhere: is no folder of a run",
    "dashboard here --entity me": "here: is no folder of a run",
    "dashboard run": "--entity: is required: the user or team that has the project",
    "dashboard run --entity me": "run/metrics.jsonl: no metrics",
    "split-outliers nowhere out --channels 1": "nowhere: no such model directory",
    "split-outliers model here --channels 1": "here exists",
    "study nowhere": "nowhere: no such config file",
    "study tbpo --arms nothing": "no arm is called nothing",
    "study mine.yaml": "nowhere: no such model directory",
    "study mine.yaml --out c.yaml": "--out c.yaml: cannot be made: File exists; name a folder",
    "study study/tbpo --arms nothing": "no arm is called nothing",
    "sweep quickstart train.steps=2": "no setting lists several values; write them as key=a,b",
    "sweep quickstart train.steps=2,x": "arm steps_x: train.steps",
    "sweep quickstart train.steps=2,3 --name a/b": "argument --name: 'a/b': a name has letters, digits, dots",
    "train quickstart run.name=a/b": "run.name: a name has letters, digits, dots, dashes and underscores, and begins",
    "sweep c.yaml seed=1,2": "the study itself sets run.name, run.dir and seed",
    "train study/tbpo": "is a study, not a config; `qarl study` runs it",
    "train Quickstart": "no such config file; did you mean quickstart?",
    "submit quickstart --address 127.0.0.1:99999": "'127.0.0.1:99999' is not a dashboard address",
    "study tbpo --seed 1": "unrecognized arguments: --seed 1",
    "mismatch here": "here: holds no config.json",
    "mismatch c.yaml": "nowhere: no such model directory",
    "mismatch model --stale-model here": "here: holds no config.json",
    "mismatch model --prompts nowhere.txt": "nowhere.txt: no such file",
    "bench loop quickstart --overrides train.stepz=2": "override 'train.stepz=2': unknown key",
    "bench steps quickstart --settings train.stepz=2": "override 'train.stepz=2': unknown key",
    "bench steps c.yaml": "nowhere: no such model directory",
    "bench e2e --configs c.yaml": "nowhere: no such model directory",
    "bench publish --model here": "here: holds no config.json",
}
"""Commands, and what is wrong with them, in a folder that `early_answers` makes."""


@pytest.fixture(scope="module")
def early_answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, str]]:
    """Exit code and stderr of each of `EARLY`, in a process that cannot import torch and the like."""
    folder = tmp_path_factory.mktemp("early")
    for name in ("here/full", "model", "run"):
        (folder / name).mkdir(parents=True)
    (folder / "c.yaml").write_text(f"inherits: quickstart\nmodel: {{path: nowhere, build: null}}\ntask: {TASK}\n")
    for name in ("train.jsonl", "heldout.jsonl"):
        (folder / name).touch()
    (folder / "mine.yaml").write_text("question: q\nbase: c.yaml\narms: {a: []}\nseeds: [0]\n")
    (folder / "model" / "config.json").write_text('{"model_type": "qwen3"}')
    (folder / "run" / "config.yaml").write_text("inherits: quickstart\n")
    command = [sys.executable, "-c", WITHOUT_TORCH, json.dumps([line.split() for line in EARLY])]
    env = os.environ | {"PYTHONPATH": str(SHIPPED.parent)}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(zip(EARLY, map(tuple, json.loads(done.stdout)), strict=True))


TASK = "{kind: dataset, train_path: train.jsonl, heldout_path: heldout.jsonl}"


@pytest.mark.parametrize("line", EARLY)
def test_what_the_input_alone_tells_comes_before_torch(early_answers: dict[str, tuple[Any, str]], line: str) -> None:
    code, error = early_answers[line]
    assert code == 2, error
    assert EARLY[line] in error


# --- bench -----------------------------------------------------------------------------------------------------------


def test_bench_pool_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "pool", "--sizes", "50", "60", "--batch", "4", "--steps", "3"]) == 0
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in capsys.readouterr().out.splitlines()]
    assert [row[:2] for row in rows[2:]] == [[n, s] for s in ("50", "60") for n in ("frontier", "uniform", "re-sort")]
    assert {len(row) for row in rows} == {12}
    assert all(cell for row in rows[2:] if row[0] != "re-sort" for cell in row)


@pytest.mark.parametrize("size", ["0", "many"])
def test_bench_pool_wants_positive_sizes(size: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["bench", "pool", "--sizes", size])
    assert f"'{size}' is not a whole number from 1 to 2147483647" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "x" * 300, "a\udc80b"], ids=["empty", "long", "no text"])
@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_no_path_is_refused_by_every_command(
    command: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for argv in before_paths(_parser(command), command):
        with pytest.raises(SystemExit, match="2"):
            main([*argv, text])
        assert f"'{text:.60}' ".encode(errors="backslashreplace").decode() in capsys.readouterr().err, argv


def before_paths(parser: argparse.ArgumentParser, *words: str) -> Iterator[list[str]]:
    """The words before each argument of a command, and of what it has below it, that is a path."""
    argv = list(words)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            own = words if parser.prog == "qarl" else None
            for name, below in action.choices.items():
                if own is None or name == words[0]:
                    yield from before_paths(below, *(own or (*words, name)))
        elif action.type in (Path, path, path_text):
            yield [*argv, *action.option_strings[:1]]
        if not action.option_strings:
            argv += [next(iter(action.choices or ["x"]))]


def test_the_paths_of_commands_are_found() -> None:
    assert list(before_paths(_parser("export"), "export")) == [["export"], ["export", "x"]]
    assert ["bench", "publish", "--model"] in before_paths(_parser("bench"), "bench")


def test_a_file_system_that_refuses_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "reward/mean": 0.5}\n')
    assert main(["report", str(tmp_path), "--out", "/proc/none/page.html"]) == 1
    assert capsys.readouterr().err == "qarl: /proc/none: No such file or directory\n"


def test_of_other_errors_of_the_system_only_those_of_a_file_system_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("launch.commands.runs.run", Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
    assert main(["runs"]) == 1
    assert capsys.readouterr().err == "qarl: No space left on device\n"
    monkeypatch.setattr("launch.commands.runs.run", Mock(side_effect=OSError("a mistake")))
    with pytest.raises(OSError, match="a mistake"):
        main(["runs"])


def test_settings_may_stand_behind_options(fail: Fail) -> None:
    assert "train.stepz" in fail("train", "quickstart", "seed=1", "--dry-run", "train.steps=2", "train.stepz=3")
    with pytest.raises(SystemExit, match="2"):
        main(["train", "quickstart", "--dryrun", "train.steps=2"])


@pytest.mark.parametrize("command", ["config keys", "config show quickstart"])
def test_a_reader_that_has_read_enough(command: str) -> None:
    pipe = f"{sys.executable} -m launch.cli {command} | head -1"
    env = os.environ | {"PYTHONPATH": str(SHIPPED.parent)}
    done = subprocess.run(["bash", "-c", pipe], capture_output=True, text=True, env=env, timeout=120)
    assert (len(done.stdout.splitlines()), done.stderr) == (1, "")


@pytest.mark.parametrize(("option", "value"), [("--response-tokens", "257"), ("--prompt-tokens", "1000")])
def test_lengths_that_do_not_fit_are_refused(fail: Fail, model_dir: Path, option: str, value: str) -> None:
    Path("c.yaml").write_text(json.dumps({"model": {"path": str(model_dir)}, "task": {"kind": "sorting"}}))
    assert f"{option}: {value} exceeds" in fail("plan", "c.yaml", option, value, "--device", "h100")


def complete(tmp_path: Path, line: str) -> set[str]:
    """What a shell gets that asks to complete `line`."""
    out = tmp_path / "completions"
    asked = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE_SUPPRESS_SPACE": "1"}
    env = os.environ | asked | {"_ARGCOMPLETE_STDOUT_FILENAME": str(out), "_ARGCOMPLETE_IFS": "\n"}
    command = [sys.executable, "-m", "launch.cli"]
    env["PYTHONPATH"] = str(SHIPPED.parent)
    subprocess.run(command, env=env, cwd=tmp_path, timeout=60, check=True, stdout=subprocess.DEVNULL)
    return set(out.read_text().split("\n"))


def test_a_shell_completes_commands_options_and_configs(tmp_path: Path) -> None:
    assert complete(tmp_path, "qarl re") == {"report"}
    assert {"--quiet", "--verbose", "--dry-run"} <= complete(tmp_path, "qarl train --")
    assert {"quickstart", "quickstart_augment"} <= complete(tmp_path, "qarl train quick")


@pytest.mark.parametrize("more", [(), ("train",)])
def test_the_version(capsys: pytest.CaptureFixture[str], more: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version", *more])
    assert capsys.readouterr().out == f"qarl {metadata.version('qarl')}\n"

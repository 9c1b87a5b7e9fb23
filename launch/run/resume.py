"""What may change between a run and its continuation, and what has changed. Free of torch and ray."""

import json
import os
from collections.abc import Mapping, Sequence
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any

from qarl.config.io import load_config
from qarl.config.policy import LearnerConfig
from qarl.config.run import Config
from qarl.errors import ConfigError
from qarl.hooks import source_file
from qarl.types import Prompt

CONFIG_FILE = "config.yaml"
INPUTS_FILE = "inputs.json"
START_OVER = "choose another run.name, or start over with run.resume=false"

RESUMABLE_CHANGES = (
    *("train.steps", "train.checkpoint_every", "train.keep_checkpoints", "eval", "tracking", "cluster", "controls"),
    *("debug.save_batches", "debug.profile_steps"),
    *("run.resume", "rollout.num_workers", "rollout.num_cpus_per_worker"),
    *("learner.num_ranks", "learner.num_threads", "learner.num_cpus_per_rank", "learner.timeout_s"),
    *("rollout.timeout_s", "rollout.max_restarts", "reward.timeout_s"),
    "rollout.read_back_every",
    *(
        f"pool.augment.validator.{key}"
        for key in ("base_url", "api_key_env", "timeout_s", "max_retries", "concurrency")
    ),
    *("mismatch.token_bounds", "mismatch.warn_above", "mismatch.stop_above"),
)
"""Keys that may differ between a run and its continuation."""


def saved_learner(config: Config) -> LearnerConfig | None:
    """The learner section of the run that `config` continues: other numbers of ranks or threads would sum gradients in
    another order. None when the run begins."""
    file = config.run.folder / CONFIG_FILE
    return load_config(file).learner if config.run.resume and os.path.isfile(file) else None


def config_of_run(run_dir: Path) -> Config:
    """The config of the run in `run_dir`. Raises ConfigError: it is no folder of a run, or its config is wrong."""
    check_is_run(run_dir)
    return load_config(run_dir / CONFIG_FILE)


def check_is_run(run_dir: Path) -> None:
    """Raises ConfigError: `run_dir` is no folder of a run."""
    if not (run_dir / CONFIG_FILE).is_file():
        raise ConfigError(f"is no folder of a run, it has no {CONFIG_FILE}", str(run_dir), "see `qarl runs`")


def check_same_run(config: Config, run_dir: Path) -> Config:
    """The config of the run in `run_dir`. Raises ConfigError when its settings are others than those of `config`."""
    old = load_config(run_dir / CONFIG_FILE)
    before, now = flatten(old.model_dump()), flatten(config.model_dump())
    changed = [
        key
        for key in sorted(now.keys() | before.keys())
        if now.get(key) != before.get(key) and not any(f"{key}.".startswith(f"{ok}.") for ok in RESUMABLE_CHANGES)
    ]
    if changed:
        raise ConfigError(f"{run_dir} was made with other settings ({', '.join(changed[:4])})", hint=START_OVER)
    return old


def input_digests(config: Config, prompts: Sequence[Prompt], heldout: Sequence[Prompt]) -> dict[str, str]:
    """Digests of what a run reads besides its config, by name: rendered prompts, their answers and other fields, files
    of the model folder (tokenizer, chat template; the weights only where an objective refers to them), the user's
    functions."""
    digests = {}
    for split, rows in (("training", prompts), ("held-out", heldout)):
        digests[f"{split} prompts"] = _digest(repr([(p.id, p.text, p.token_ids) for p in rows]).encode())
        fields = [(p.answers, p.level, p.source, p.heldout_set, p.metadata) for p in rows]
        digests[f"{split} answers and other fields"] = _digest(repr(fields).encode())
    patterns = ["*.json", "*.jinja", "*.txt", "*.model"] + ["*.safetensors"] * (config.objective.kl_coef > 0)
    for file in sorted(file for pattern in patterns for file in Path(config.model.path).glob(pattern)):
        with file.open("rb") as opened:
            digests[str(file)] = file_digest(opened, "sha256").hexdigest()
    return digests | {name: _digest(file.read_bytes()) for name, file in function_files(config).items()}


def function_files(config: Config) -> dict[str, Path]:
    """The files of the user's functions that decide on the figures, by their names in the config."""
    names = (
        *(name for name, *_ in config.reward.functions()),
        None if config.environment.python else config.environment.function,
        *(getattr(part, "function", None) for part in (config.objective, config.task)),
    )
    return {name: file for name in names if name and (file := source_file(name))}


def changed_inputs(run_dir: Path, digests: Mapping[str, str]) -> list[str]:
    """Names of the inputs that have changed since the run in `run_dir` began. Raises ConfigError: that is not known."""
    file = run_dir / INPUTS_FILE
    try:
        before = dict(json.loads(file.read_text()))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ConfigError(f"no digests of the run's inputs: {error}", str(file), START_OVER) from error
    return sorted(name for name in before.keys() | digests.keys() if before.get(name) != digests.get(name))


def _digest(data: bytes) -> str:
    return sha256(data).hexdigest()


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Key -> value of a config, `train.steps` for example."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat

"""What may change between a run and its continuation. Free of torch and ray."""

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from qarl.config.io import validate
from qarl.config.run import Config
from qarl.errors import ConfigError

RESUMABLE_CHANGES = (
    *("train.steps", "train.checkpoint_every", "train.keep_checkpoints", "eval", "tracking", "cluster", "controls"),
    *("debug.save_batches", "debug.profile_steps"),
    *("run.resume", "rollout.num_workers", "rollout.timeout_s", "rollout.max_restarts", "reward.timeout_s"),
    *(
        f"pool.augment.validator.{key}"
        for key in ("base_url", "api_key_env", "timeout_s", "max_retries", "concurrency")
    ),
    *("mismatch.token_bounds", "mismatch.warn_above", "mismatch.stop_above"),
)
"""Keys that may differ between a run and its continuation."""


def check_same_run(config: Config, run_dir: Path) -> None:
    """Raises ConfigError when `run_dir` belongs to a run with other settings."""
    file = run_dir / "config.yaml"
    if not file.exists():
        return
    old = OmegaConf.to_container(OmegaConf.load(file))
    assert isinstance(old, dict)
    before = _flatten(validate({str(k): v for k, v in old.items()}, str(file)).model_dump())
    now = _flatten(config.model_dump())
    changed = [
        key
        for key in sorted(now.keys() | before.keys())
        if now.get(key) != before.get(key) and not any(f"{key}.".startswith(f"{ok}.") for ok in RESUMABLE_CHANGES)
    ]
    if changed:
        raise ConfigError(
            f"{run_dir} was made with other settings ({', '.join(changed[:4])})",
            hint="give this run another run.name, or start over with run.resume=false",
        )


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat

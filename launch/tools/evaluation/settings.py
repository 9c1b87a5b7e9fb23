"""What `qarl eval` evaluates, and how it samples. Free of torch: what is wrong here shows at once."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.early import read_model
from launch.run.resume import CONFIG_FILE
from qarl.config.io import load_config
from qarl.config.run import Config
from qarl.config.shipped import config_path
from qarl.errors import ConfigError
from qarl.model_folder import config_json


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn. Masks are allowed here: nothing learns from these samples."""

    num_samples: int
    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0


def config_of(what: str, overrides: Sequence[str], model: Path | None = None) -> Config:
    """The config of a run, or of that name, with the model to evaluate: `model`, or a run's final one, or the one that
    a config starts from.

    Raises ConfigError, ModelError: there is no such config, or no model.
    """
    run = Path(what)
    is_run = (run / CONFIG_FILE).is_file()
    config = load_config(run / CONFIG_FILE if is_run else config_path(what), overrides)
    path = model or (run / "final" if is_run else Path(config.model.path))
    if model or is_run:
        if not model and not path.is_dir():
            hint = f"qarl export {run} MODEL --format none, then qarl eval {run} --model MODEL"
            raise ConfigError("the run has no final model", str(run), hint)
        config_json(path)
    else:
        read_model(config.model, config.task)
    return config.model_copy(update={"model": config.model.model_copy(update={"path": str(path), "build": None})})


def config_for(config: Config, sampling: Sampling, num_prompts: int) -> Config:
    """`config` with what the evaluation sets. Raises ConfigError: there is no room for a prompt."""
    rollout = config.rollout
    if sampling.max_new_tokens >= rollout.max_model_len:
        what = f"{sampling.max_new_tokens} leaves no room for a prompt in rollout.max_model_len {rollout.max_model_len}"
        raise ConfigError(what, "--max-new-tokens", "lower it, or raise rollout.max_model_len")
    length = {"max_new_tokens": sampling.max_new_tokens}
    sections = {
        "rollout": rollout.model_copy(update={"sampling": rollout.sampling.model_copy(update=length)}),
        "eval": config.eval.model_copy(update={"num_prompts": num_prompts, "final_num_prompts": num_prompts}),
    }
    return config.model_copy(update=sections)

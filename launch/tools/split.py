"""`qarl split-outliers`: a model with flatter weights that computes the same."""

import shutil
from pathlib import Path

from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from qarl.errors import ConfigError
from qarl.quant.outliers import split_outliers
from qarl.quant.publish import unquantized_config


def split(model: Path, out: Path, channels: int) -> str:
    """Write `model` with `channels` outlier channels of every MLP split to the new folder `out`; returns a summary.

    Raises:
        ConfigError: `out` exists or cannot be written, or `channels` is not positive.
        ModelError: `model` is no folder of a full-precision model with gate/up/down MLPs.
    """
    unquantized_config(model)
    if out.exists():
        raise ConfigError(f"{out} exists", hint="name a new folder")
    loaded = AutoModelForCausalLM.from_pretrained(str(model), dtype="auto", local_files_only=True)
    before = loaded.config.intermediate_size
    split_outliers(loaded, channels)
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        loaded.save_pretrained(part)
        AutoTokenizer.from_pretrained(str(model), local_files_only=True).save_pretrained(part)
        part.rename(out)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"cannot be written: {error}", where=str(out), hint="nothing was left there") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return f"{out}: intermediate_size {before} -> {before + channels}, the same function"

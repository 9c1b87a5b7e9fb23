"""`qarl split-outliers`: a model with flatter weights that computes the same."""

import shutil
from pathlib import Path

from launch.early import check_new
from qarl.errors import ConfigError
from qarl.model_folder import check_folder, config_json, load_model, read_tokenizer


def split(model: Path, out: Path, channels: int) -> str:
    """Write `model` with `channels` outlier channels of every MLP split to the new folder `out`; returns a summary.

    Raises:
        ConfigError: `out` exists or cannot be written, or `channels` is not positive or above the inner width.
        ModelError: `model` is no folder of a full-precision model with gate/up/down MLPs.
    """
    config_json(model)
    check_new(out)
    from safetensors import SafetensorError  # late: what is above needs no torch

    from qarl.quant.outliers import split_outliers

    width = check_folder(model).config.intermediate_size
    if channels > width:
        raise ConfigError(f"{channels} is more than the model's {width} inner channels", "--channels", "split fewer")
    loaded, tokenizer = load_model(model, "auto"), read_tokenizer(model)
    before = loaded.config.intermediate_size
    split_outliers(loaded, channels)
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        loaded.save_pretrained(part)
        tokenizer.save_pretrained(part)
        part.rename(out)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"cannot be written: {error}", where=str(out), hint="nothing was left there") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return f"{out}: intermediate_size {before} -> {before + channels}, the same function"

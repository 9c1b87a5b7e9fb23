"""`qarl split-outliers`: a model with flatter weights that computes the same."""

import shutil
from pathlib import Path

from safetensors import SafetensorError

from qarl.errors import ConfigError
from qarl.model_folder import check_folder, load_model, read_tokenizer
from qarl.quant.outliers import split_outliers


def split(model: Path, out: Path, channels: int) -> str:
    """Write `model` with `channels` outlier channels of every MLP split to the new folder `out`; returns a summary.

    Raises:
        ConfigError: `out` exists or cannot be written, or `channels` is not positive or above the inner width.
        ModelError: `model` is no folder of a full-precision model with gate/up/down MLPs.
    """
    width = check_folder(model).config.intermediate_size
    if channels > width:
        raise ConfigError(f"{channels} is more than the model's {width} inner channels", "--channels", "split fewer")
    if out.exists():
        raise ConfigError(f"{out} exists", hint="name a new folder")
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

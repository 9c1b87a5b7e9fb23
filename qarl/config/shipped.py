"""Where the config lies that a command line or `inherits` names, and known sizes of published models."""

import os
from importlib.resources import files
from pathlib import Path


def config_path(name: str, folder: str = "", beside: Path = Path()) -> Path:
    """The config called `name`: a file relative to `beside`, or by its stem one that is shipped in `configs/folder`."""
    path = beside / os.path.expanduser(name)  # unlike pathlib's it leaves an unknown user as it is
    stem = name.removeprefix(f"{folder}/") if folder else name
    shipped = Path(str(files("configs"))) / folder / f"{stem}.yaml"
    return path if path.suffix in {".yaml", ".yml"} or path.exists() or not shipped.is_file() else shipped


def shipped_names() -> list[str]:
    """What `config_path` takes for the shipped configs, those of studies included."""
    folder = Path(str(files("configs")))
    return sorted(file.relative_to(folder).with_suffix("").as_posix() for file in folder.glob("**/*.yaml"))


def model_sizes(path: str) -> Path | None:
    """A folder with the sizes of the published model that belongs at `path`, by its last part: a config.json."""
    folder = Path(str(files("configs"))) / "models" / Path(path).name
    return folder if folder.is_dir() else None

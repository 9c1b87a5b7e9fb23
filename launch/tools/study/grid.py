"""`qarl sweep`: a study that has an arm for each combination of listed values."""

import re
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from launch.run.files import write_whole
from launch.tools.study.arms import RUNS, Study, StudyConfig, plan
from qarl.config.io import validate_as
from qarl.errors import ConfigError

SAME_NAME = "list each value once; a name has _ for all characters but letters, digits, dots and dashes"


def write_grid(base: Path, items: Sequence[str], name: str, seeds: Sequence[int]) -> Path:
    """Write the study of `items` over the config `base`: `a.b=1,2` are two arms, `a.b=1` is set in all of them.

    Raises ConfigError: nothing lists several values, a combination is listed twice, or one is no valid config.
    """
    settings = {key: _values(value) for key, _, value in (item.partition("=") for item in items)}
    listed = {key: values for key, values in settings.items() if len(values) > 1}
    if not listed:
        raise ConfigError("no setting lists several values", str(base), "write them as key=a,b")
    arms = [dict(zip(listed, values, strict=True)) for values in product(*listed.values())]
    compared = "; ".join(f"{key} {', '.join(values)}" for key, values in listed.items())
    tree: dict[str, Any] = {
        "question": f"Which is best, of {compared}?",
        "base": str(base.absolute()),
        "overrides": [f"{key}={values[0]}" for key, values in settings.items() if len(values) == 1],
        "arms": {_name(arm): [f"{key}={value}" for key, value in arm.items()] for arm in arms},
        "seeds": list(seeds),
    }
    if len(tree["arms"]) < len(arms):
        raise ConfigError("two combinations have the same name", ", ".join(listed), SAME_NAME)
    file = Path(RUNS, name, f"{name}.yaml")
    config = validate_as(StudyConfig, tree, str(file))
    # What is wrong is told before anything is written.
    planned = plan(Study(name, file, config, tuple(config.arms), tuple(seeds)))
    whole = [run.config.model_dump(exclude={"run"}) for run in planned]
    for run, settings in zip(planned, whole, strict=True):
        if whole.count(settings) > 1:
            raise ConfigError(f"{run.arm}: another combination is the same run", str(base), "list each value once")
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, yaml.safe_dump(tree, sort_keys=False))
    return file


def _values(text: str) -> list[str]:
    """What lies between commas, but not those within quotes, lists and mappings."""
    values, depth, quote = [""], 0, ""
    for sign in text:
        if quote:
            quote = "" if sign == quote else quote
        elif sign in "'\"" and values[-1][-1:] in ("", *" [{,:"):
            quote = sign
        else:
            depth += (sign in "[{") - (sign in "]}")
        if sign == "," and not depth and not quote:
            values.append("")
        else:
            values[-1] += sign
    return values


def _name(arm: dict[str, str]) -> str:
    """The name of an arm, for example "lr_1e-4-group_size_8"."""
    values = [re.sub("[^A-Za-z0-9_.-]+", "_", value).strip("_") for value in arm.values()]
    return "-".join(f"{key.rpartition('.')[2]}_{value}" for key, value in zip(arm, values, strict=True))

"""What several commands share: configs on the command line, and kinds of numbers. Imports nothing heavy."""

import argparse
import re
from collections.abc import Callable
from math import nan
from pathlib import Path
from typing import TYPE_CHECKING

from qarl.config.shipped import config_path, shipped_names

if TYPE_CHECKING:
    from qarl.config.run import Config
    from qarl.quant.scheme import QuantScheme

NETWORK = 12.5
"""GB/s between machines that simulations assume."""


def add_config(parser: argparse.ArgumentParser) -> None:
    """Add a config and its overrides."""
    text = "a YAML file, or the name of a shipped config (see `qarl config list`)"
    config = parser.add_argument("config", type=path_text, help=text)
    vars(config)["completer"] = lambda **_: shipped_names()  # for argcomplete
    add_overrides(parser)


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Add settings that take the place of a config's own."""
    text = "settings in place of the config's own"
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help=text)


def read_config(args: argparse.Namespace, *more: str) -> "Config":
    """The config that the arguments name, with `more` overrides. Raises ConfigError."""
    from qarl.config.io import load_config

    return load_config(config_path(args.config), [*args.overrides, *more])


def schemes() -> "dict[str, QuantScheme]":
    """Every scheme by its label."""
    from typing import get_args

    from qarl.quant.scheme import QuantScheme, SchemeName

    found = [QuantScheme(name, group_size=size) for name in get_args(SchemeName) for size in (32, 64, 128)]
    return {scheme.label: scheme for scheme in found}


def add_formats(add: Callable[..., object], option: str, text: str, **settings: object) -> None:
    """Add an option that takes the label of a scheme, or several."""
    known = schemes()
    add(option, choices=known, metavar="FORMAT", help=f"{text}, of {', '.join(known)}", **settings)


def path_text(text: str) -> str:
    """Raises ArgumentTypeError: it is empty, longer than file systems take, or not Unicode."""
    from qarl.config.base import usable_path

    try:
        return usable_path(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text[:60]!r} {error}") from None


def path(text: str) -> Path:
    """As `path_text`."""
    return Path(path_text(text))


def out_file(text: str) -> Path:
    """A file to write. Raises ArgumentTypeError: as `path_text`, or it cannot be one."""
    file = path(text)
    if file.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder; name a file")
    above = next(folder for folder in file.absolute().parents if folder.exists())
    if not above.is_dir():
        raise argparse.ArgumentTypeError(f"{above} is no folder; name another file")
    return file


def name(text: str) -> str:
    """Raises ArgumentTypeError: it cannot be the name of a run or study."""
    from qarl.config.base import NAME_PATTERN, NAME_TEXT

    if not re.fullmatch(NAME_PATTERN, text):
        raise argparse.ArgumentTypeError(f"'{text[:60]}': {NAME_TEXT}")
    return text


def positive_int(text: str) -> int:
    """Raises ArgumentTypeError for anything but a whole number from 1 to 2,147,483,647, as configs take them."""
    number = int(text) if text.isdecimal() and len(text) < 20 else 0
    if not 1 <= number < 2**31:
        raise argparse.ArgumentTypeError(f"'{text:.60}' is not a whole number from 1 to {2**31 - 1}")
    return number


def number_in(low: float, high: float) -> Callable[[str], float]:
    """Reads a number of at least `low` and at most `high`. It raises ArgumentTypeError for anything else."""

    def read(text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            number = nan
        if not low <= number <= high:
            raise argparse.ArgumentTypeError(f"'{text}' is not a number from {low:g} to {high:g}")
        return number

    return read


def multiple_of_128(text: str) -> int:
    """Raises ArgumentTypeError for anything else."""
    number = positive_int(text)
    if number % 128:
        raise argparse.ArgumentTypeError(f"'{text}' is not a multiple of 128")
    return number

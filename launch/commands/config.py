"""Show the resolved config of a run, list the shipped configs, or explain every key."""

import argparse

from launch.arguments import add_config, read_config
from qarl.config.shipped import config_path, shipped_names

EXAMPLES = """\
  qarl config list
  qarl config show quickstart train.steps=10
  qarl config keys"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_subparsers(required=True, metavar="WHAT")
    text = "print a config with every default filled in"
    show = what.add_parser("show", help=text, description=text)
    add_config(show)
    show.set_defaults(what=_show)
    text = "list the shipped configs"
    what.add_parser("list", help=text, description=text).set_defaults(what=_list)
    text = "list every key with its default and meaning"
    what.add_parser("keys", help=text, description=text).set_defaults(what=_keys)


def run(args: argparse.Namespace) -> int:
    args.what(args)
    return 0


def _show(args: argparse.Namespace) -> None:
    from qarl.config.io import to_yaml

    print(to_yaml(read_config(args)), end="")


def _list(_: argparse.Namespace) -> None:
    for name in shipped_names():
        print(f"{name:28s} {config_path(name).read_text().splitlines()[0].removeprefix('# ')}")


def _keys(_: argparse.Namespace) -> None:
    from qarl.config.io import documentation

    for key, default, description in documentation():
        shown = default.replace("\n", "\\n")  # one line each
        print(f"{key}{f' = {shown}' if default else ''}\n    {description}")

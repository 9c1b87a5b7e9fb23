"""Functions of the user's own, which a config names: `module:function` or `path/to/file.py:function`.

Every process that needs the function loads it by its name. Nothing is pickled, so the file must be on every node. Ray
puts the driver's working directory on the `sys.path` of every actor.
"""

import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from typing import Any

from qarl.errors import TRACEBACK, ConfigError

Hook = Callable[..., Any]
HOW = "write module:function or path/to/file.py:function"


def load_function(name: str, where: str) -> Hook:
    """The function called `name`. Modules and files are found in the working directory and on `sys.path`; a file is run
    once in a process.

    Args:
        where: the config key that holds `name`, for errors.

    Raises ConfigError: `name` has no colon, there is no such file, the module or file cannot be imported, it has no
    such attribute, or the attribute cannot be called.
    """
    source, colon, attribute = name.rpartition(":")
    if not (source and colon and attribute):
        raise ConfigError(f"'{name}' names no function", where, HOW)
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # as `python -m` does, and the `qarl` script does not
    file = _find(source, where) if source.endswith(".py") else None
    try:
        module = _run(file) if file else importlib.import_module(source)
    except (Exception, SystemExit) as error:  # the user's code may raise anything
        reason = " ".join(str(error).split())
        raise ConfigError(f"cannot import {source}: {type(error).__name__}: {reason}", where, TRACEBACK) from error
    if not hasattr(module, attribute):
        raise ConfigError(f"{source} has no attribute '{attribute}'", where, HOW)
    function = getattr(module, attribute)
    if not callable(function):
        raise ConfigError(f"{name} is a {type(function).__name__}, not a function", where, HOW)
    return function


def source_file(name: str) -> Path | None:
    """The file that has the function called `name`; None for a builtin. Raises ConfigError as `load_function` does."""
    function = inspect.unwrap(load_function(name, ""))
    try:
        found = inspect.getsourcefile(function)
    except TypeError:  # neither function nor class, but a partial or an object that can be called
        module = name.rpartition(":")[0]
        found = str(_find(module, "")) if module.endswith(".py") else getattr(sys.modules[module], "__file__", None)
    return Path(found) if found else None


def check_call(function: Hook, arguments: Sequence[str], kwargs: Mapping[str, Any], where: str) -> None:
    """Raises ConfigError unless `function` takes these positional `arguments`, given by their names, and `kwargs`."""
    try:
        inspect.signature(function).bind(*arguments, **kwargs)
    except (TypeError, ValueError) as error:  # ValueError: a builtin without a signature
        call = ", ".join([*arguments, *(f"{key}={value!r}" for key, value in kwargs.items())])
        title = getattr(function, "__name__", type(function).__name__)
        what = f"{title} cannot be called as {title}({call}): {error}"
        raise ConfigError(what, where, "change its parameters, or the settings that it gets") from error


def _find(path: str, where: str) -> Path:
    for folder in ("", *sys.path):  # an actor may run in another folder than the driver
        if (file := Path(folder, os.path.expanduser(path))).is_file():
            return file.resolve()
    raise ConfigError(f"no such file: {path}", where, "a relative path starts at the working directory")


def _run(file: Path) -> ModuleType:
    """The module that `file` makes; run once in a process, as an import is."""
    title = f"qarl_hook:{file}"  # a name that no import statement can mean
    if title not in sys.modules:
        spec = importlib.util.spec_from_file_location(title, file)
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules[title] = importlib.util.module_from_spec(spec)
        with ExitStack() as stack:
            stack.callback(sys.modules.pop, title)  # half a module must not stay
            spec.loader.exec_module(module)
            stack.pop_all()
    return sys.modules[title]

"""Reading and writing configs: YAML with inheritance, overrides, and errors that name the nearest key."""

import difflib
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar, get_args

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from yaml import YAMLError

from qarl.config.base import Node
from qarl.config.run import Config
from qarl.errors import ConfigError

AnyNode = TypeVar("AnyNode", bound=Node)


def _unions(model: type[BaseModel]) -> dict[str, str]:
    """Keys whose section is of one of several kinds, with the kind of their default ("" for none)."""
    found: dict[str, str] = {}
    for name, field in model.model_fields.items():
        if field.discriminator is not None:
            found[name] = getattr(field.default, "kind", "")
        for section in _sections(field.annotation):
            found |= _unions(section)
    return found


def _sections(annotation: Any) -> list[type[BaseModel]]:
    """The sections that a field may hold."""
    kinds = (annotation, *get_args(annotation))
    return [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]


UNIONS = _unions(Config)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read `path` and what it inherits, apply `a.b=c` overrides, validate.

    Raises:
        ConfigError: file missing or not YAML, unknown key, wrong type, contradiction; one line for each fault.
    """
    tree = read_tree(Path(path))
    for item in overrides:
        if "=" not in item.strip("="):
            raise ConfigError(f"override '{item}' is not key=value", hint="write for example train.steps=10")
    try:
        merged = _merge(tree, OmegaConf.from_dotlist(list(overrides)))
        plain = OmegaConf.to_container(merged, resolve=True)
    except YAMLError as error:
        raise ConfigError(f"not YAML: {' '.join(str(error).split())}", where="overrides") from error
    except OmegaConfBaseException as error:
        raise ConfigError(str(error).splitlines()[0], where=str(path)) from error
    assert isinstance(plain, dict)
    return validate({str(k): v for k, v in plain.items()}, str(path))


def validate(tree: dict[str, Any], where: str) -> Config:
    """A `Config` from a plain tree. Raises ConfigError that lists every fault with its full key."""
    return validate_as(Config, tree, where)


def validate_as(kind: type[AnyNode], tree: dict[str, Any], where: str) -> AnyNode:
    """A `kind` from a plain tree. Raises ConfigError that lists every fault with its full key."""
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        faults = "; ".join(_explain(fault, kind) for fault in error.errors())
        raise ConfigError(faults, where=where) from None


def to_yaml(config: Config) -> str:
    """The whole tree with every default filled in, as YAML that `load_config` reads back equal."""
    return OmegaConf.to_yaml(OmegaConf.create(config.model_dump(mode="json")))


def documentation(kind: type[Node] = Config) -> Iterator[tuple[str, str, str]]:
    """(key, default, description) of every field, depth first."""
    yield from _document(kind, "")


def read_tree(path: Path, trail: tuple[Path, ...] = ()) -> DictConfig:
    """The file merged over what it inherits (`trail` inherited it), nothing resolved or validated.

    Raises:
        ConfigError: file missing, not YAML, not a mapping, or inheriting itself.
    """
    if path in trail:
        raise ConfigError("inherits itself", where=" -> ".join(map(str, (*trail, path))))
    if not path.is_file():
        raise ConfigError("no such config file", where=str(path), hint="`qarl config list` names the shipped ones")
    try:
        tree = OmegaConf.load(path)
    except (YAMLError, UnicodeDecodeError, OmegaConfBaseException) as error:
        raise ConfigError(f"not YAML: {' '.join(str(error).split())}", where=str(path)) from error
    except OSError as error:  # OmegaConf's answer to a file that holds a bare number
        raise ConfigError(f"cannot read: {error}", where=str(path)) from error
    if not isinstance(tree, DictConfig):
        raise ConfigError("a config file holds `key: value` lines", where=str(path))
    parent = tree.pop("inherits", None)
    if parent is None:
        return tree
    return _merge(read_tree(path.parent / str(parent), (*trail, path)), tree)


def _merge(base: DictConfig, over: DictConfig) -> DictConfig:
    """`over` wins. A section to which it gives another `kind` starts afresh: the old kind's keys mean nothing there."""
    old, new = (OmegaConf.to_container(tree, resolve=False) for tree in (base, over))
    merged = OmegaConf.merge(_forget_other_kinds(old, new), over)
    assert isinstance(merged, DictConfig)
    return merged


def _forget_other_kinds(base: Any, over: Any) -> Any:
    if not isinstance(base, dict) or not isinstance(over, dict):
        return base
    kept = {}
    for key, section in base.items():
        new = over.get(key)
        if key in UNIONS and isinstance(section, dict) and isinstance(new, dict):
            kind = section.get("kind", UNIONS[key])
            if new.get("kind", kind) != kind:
                continue
        kept[key] = _forget_other_kinds(section, new)
    return kept


def _explain(fault: ErrorDetails, kind: type[Node]) -> str:
    # Union members appear in `loc` as their tag; the user never wrote it.
    parts = [str(p) for p in fault["loc"]]
    key = ".".join(part for before, part in pairwise(["", *parts]) if before not in UNIONS)
    if fault["type"] == "extra_forbidden":
        known = [name for name, _, _ in documentation(kind)]
        near = [name for name in difflib.get_close_matches(key, known, n=2, cutoff=0.5) if name != key]
        hint = f", did you mean '{near[0]}'?" if near else ", `qarl config keys` lists the known ones"
        return f"unknown key '{key}'{hint}"
    if fault["type"] == "missing":
        return f"{key}: required"
    if fault["type"] == "value_error":
        return fault["msg"].removeprefix("Value error, ")
    return f"{key}: {fault['msg'].lower()}, not {fault['input']!r}"


def _document(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, str, str]]:
    seen: set[str] = set()
    for name, field in model.model_fields.items():
        key = prefix + name
        default = "required" if field.is_required() else field.get_default()
        shown = "" if isinstance(default, BaseModel) else str(default)
        description = field.description or ("Which kind; the other keys depend on it." if name == "kind" else "")
        yield key, shown, " ".join(description.split())
        for section in _sections(field.annotation):
            for row in _document(section, key + "."):
                if row[0] not in seen:
                    seen.add(row[0])
                    yield row

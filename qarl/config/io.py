"""Reading and writing configs: YAML with inheritance, overrides, and errors that name the nearest key."""

import difflib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import reduce
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from yaml import YAMLError

from qarl.config.base import NAME_PATTERN, NAME_TEXT, Node
from qarl.config.run import Config
from qarl.config.shipped import config_path, shipped_names
from qarl.errors import ConfigError, first_line

AnyNode = TypeVar("AnyNode", bound=Node)
Tree = dict[Any, Any]
"""Plain values: nothing resolved, nothing validated."""
Layer = tuple[str, Tree]
"""A file or an override, and what stands in it."""


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
MOVED = {"advantage.overlong_cache": "a component of reward.components, of the kind overlong"}
"""Keys of before, and what took their place."""


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read `path` and what it inherits, apply `a.b=c` overrides, validate.

    Raises:
        ConfigError: file missing or not YAML, unknown key, wrong type, contradiction; one line for each fault.
    """
    layers = [*read_layers(Path(path)), *map(_override, overrides)]
    if layers[0][1].keys() >= {"base", "arms"}:
        raise ConfigError("is a study, not a config", str(path), "`qarl study` runs it")
    with _reading(str(path), layers):
        plain = OmegaConf.to_container(OmegaConf.create(_merge_all(tree for _, tree in layers)), resolve=True)
    assert isinstance(plain, dict)
    return validate_as(Config, {str(k): v for k, v in plain.items()}, str(path), layers)


def validate(tree: dict[str, Any], where: str) -> Config:
    """A `Config` from a plain tree. Raises ConfigError that lists every fault with its full key."""
    return validate_as(Config, tree, where)


def validate_as(kind: type[AnyNode], tree: dict[str, Any], where: str, layers: Sequence[Layer] = ()) -> AnyNode:
    """A `kind` from a plain tree.

    Raises ConfigError that lists every fault with its full key, and the one of `layers` that it comes from.
    """
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        messages = [_explain(fault, kind) for fault in error.errors()]
        origins = [_origin(message, layers) or where for message in messages]
        if len(set(origins)) == 1:
            raise ConfigError("; ".join(messages), where=origins[0]) from None
        told = [m if origin == where else f"{m} (in {origin})" for m, origin in zip(messages, origins, strict=True)]
        raise ConfigError("; ".join(told), where=where if where in origins else "") from None


def to_yaml(config: Config) -> str:
    """The whole tree with every default filled in, as YAML that `load_config` reads back equal."""
    return yaml.safe_dump(_escaped(config.model_dump(mode="json")), sort_keys=False, allow_unicode=True)


def _escaped(value: Any) -> Any:
    """`value` with every text as it is written, where OmegaConf would read `${...}` as a reference."""
    if isinstance(value, dict):
        return {key: _escaped(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_escaped(item) for item in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


def read_layers(path: Path, heirs: tuple[Path, ...] = ()) -> list[Layer]:
    """What the file inherits, the first one first, and the file itself; nothing resolved or validated.

    Args:
        heirs: the files that inherit it.

    Raises:
        ConfigError: file missing, not YAML, not a mapping, or inheriting itself.
    """
    with _reading(str(path)):
        if path.resolve() in [heir.resolve() for heir in heirs]:
            raise ConfigError(
                "inherits itself", " -> ".join(map(str, (*heirs, path))), "remove one of these `inherits`"
            )
        if not path.is_file():
            raise ConfigError("no such config file", str(path), _hint(path, heirs))
        text = path.read_text(encoding="utf-8-sig")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if root is not None and not isinstance(root, yaml.MappingNode):
            raise ConfigError("a config file holds `key: value` lines", where=str(path))
        tree = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
        assert isinstance(tree, dict)
        parent = tree.pop("inherits", None)
        if parent is None:
            return [(str(path), tree)]
        if not isinstance(parent, str) or not parent or "${" in parent or parent == "???":
            raise ConfigError(f"inherits: the name of one file, not {_shown(parent)}", where=str(path))
        return [*read_layers(config_path(parent, beside=path.parent), (*heirs, path)), (str(path), tree)]


def _hint(path: Path, heirs: tuple[Path, ...]) -> str:
    """What to do about a config file that is not there."""
    near = difflib.get_close_matches(path.stem.lower(), shipped_names(), n=1, cutoff=0.5)
    if heirs:
        return f"`inherits` of {heirs[-1]} names it" + (f"; did you mean {near[0]}?" if near else "")
    if (path / "config.yaml").is_file():
        return "it is the folder of a run; name its config.yaml"
    if path.is_dir():
        return "it is a folder, and not of a run"
    if "=" in path.name:
        return "the config comes first, then key=value"
    return f"did you mean {near[0]}?" if near else "`qarl config list` names the shipped ones"


def _override(item: str) -> Layer:
    """One `a.b=c`, read. Raises ConfigError."""
    where = f"override '{_cut(' '.join(item.split()))}'"  # one line
    key, _, value = item.partition("=")
    if not key or not value:
        raise ConfigError(f"{where} is not key=value", hint="write for example train.steps=10")
    with _reading(where):
        item.encode()  # raises for bytes that are no UTF-8, which the shell may hand on
        tree = OmegaConf.to_container(OmegaConf.from_dotlist([item]), resolve=False)
        assert isinstance(tree, dict)
        if value.lstrip().startswith("#"):
            raise ConfigError("YAML reads its value as a comment", where, "put it in quotes")
        if "" in key.split("."):
            raise ConfigError("a part of its key is empty", where, "`qarl config keys` lists the keys")
    return where, tree


@contextmanager
def _reading(where: str, layers: Sequence[Layer] = ()) -> Iterator[None]:
    """Turns what reading a file or an override raises into a ConfigError, which names the one of `layers` that the
    fault comes from, where that is known."""
    try:
        yield
    except RecursionError as error:
        raise ConfigError("nested too deeply", where) from error
    except OmegaConfBaseException as error:
        key = f"{error.full_key}: " if error.full_key else ""
        raise ConfigError(f"{key}{first_line(error)}", _origin(key, layers) or where) from error
    except OSError as error:
        raise ConfigError(f"cannot read: {error.strerror or error}", _cut(where)) from error
    except UnicodeEncodeError as error:
        raise ConfigError("holds bytes that are no text", where, "write it as UTF-8") from error
    except RuntimeError as error:  # pathlib's, for links in a circle
        raise ConfigError(f"cannot read: {_cut(str(error), 200)}", where) from error
    except (YAMLError, ValueError) as error:  # ValueError: no UTF-8, a null byte, a number of too many digits
        reason = " ".join(str(error).replace('"<unicode string>", ', "").split())
        raise ConfigError(f"not YAML: {_cut(reason, 300)}", where) from error


def read_tree(path: Path) -> dict[str, Any]:
    """The file over what it inherits, nothing resolved or validated. Raises as `read_layers` does."""
    return {str(key): value for key, value in _merge_all(tree for _, tree in read_layers(path)).items()}


def _merge_all(trees: Iterable[Tree]) -> Tree:
    """Plain trees in one; the last one wins."""
    return reduce(_merge, trees, {})


def _merge(base: Any, over: Any) -> Any:
    """`over` wins, section by section; a list is one value.

    A section to which it gives another `kind` starts afresh: the old kind's keys mean nothing there.
    """
    if not isinstance(base, dict) or not isinstance(over, dict):
        return over
    base = _forget_other_kinds(base, over)
    return base | {key: _merge(base[key], value) if key in base else value for key, value in over.items()}


def _forget_other_kinds(base: Tree, over: Tree) -> Tree:
    """`base` without the sections whose kind `over` changes."""

    def is_kept(key: Any) -> bool:
        old, new = base[key], over.get(key)
        if key not in UNIONS or not isinstance(old, dict) or not isinstance(new, dict):
            return True
        kind = old.get("kind", UNIONS[key])
        return bool(new.get("kind", kind) == kind)

    return {key: section for key, section in base.items() if is_kept(key)}


def _explain(fault: ErrorDetails, kind: type[Node]) -> str:
    # Union members appear in `loc` as their tag; the user never wrote it.
    parts = [str(p) for p in fault["loc"]]
    key = ".".join(part for before, part in pairwise(["", *parts]) if before not in UNIONS)
    what, given, context = fault["type"], fault["input"], fault.get("ctx", {})
    if what == "extra_forbidden":
        if "settings" in parts:
            return f"unknown key '{_cut(key)}', docs/rewards.md has those of each kind"
        if key in MOVED:
            return f"unknown key '{key}', it is now {MOVED[key]}"
        near = " or ".join(f"'{name}'" for name in _nearest(key, [name for name, _, _ in documentation(kind)]))
        hint = f", did you mean {near}?" if near else ", `qarl config keys` lists the known ones"
        return f"unknown key '{_cut(key)}'{hint}"
    if what == "missing":
        return f"{key}: required"
    if what == "value_error":
        message = fault["msg"].removeprefix("Value error, ")
        if ": " not in message:
            return f"{key}: {message}, not {_shown(given)}"
        return f"{key}.{message}" if parts[-1:] == ["settings"] else message  # only these do not know where they stand
    if what == "union_tag_invalid":
        return f"{key}.kind: must be one of {context['expected_tags']}, not {_shown(given['kind'])}"
    if what == "union_tag_not_found":
        return f"{key}.kind: required, the name of a kind"
    if what == "model_type":
        return f"{key}: a section of keys, not {_shown(given)}"
    if what == "model_attributes_type" or (what.endswith("_type") and parts and parts[-1] in UNIONS):
        return f"{key}: a section of keys, among them kind, not {_shown(given)}"
    if what == "string_pattern_mismatch" and context["pattern"] == NAME_PATTERN:
        return f"{key}: {NAME_TEXT}, not {_shown(given)}"
    quotes = "; put it in quotes, which YAML must see" if what == "string_type" and given is not None else ""
    return f"{key}: {fault['msg'][:1].lower()}{fault['msg'][1:]}, not {_shown(given)}{quotes}"


def _nearest(key: str, known: Sequence[str]) -> list[str]:
    """The known keys that `key` may stand for: those that end alike, in whatever section, or the one most like it."""
    if key.lower() in known and key.lower() != key:
        return [key.lower()]
    alike = [name for name in known if name.rpartition(".")[2] == key.lower().rpartition(".")[2] and name != key]
    if alike:
        return difflib.get_close_matches(key.lower(), alike, n=3, cutoff=0.0)
    return difflib.get_close_matches(key.lower(), [name for name in known if name != key], n=1, cutoff=0.5)


def _shown(value: object) -> str:
    """`value` for a message."""
    return _cut(repr(value))


def _cut(text: str, longest: int = 80) -> str:
    return text if len(text) <= longest else f"{text[: longest - 3]}..."


def _origin(message: str, layers: Sequence[Layer]) -> str:
    """Name of the last layer that sets the key at the start of `message`, or another key in it; "" when none does."""
    unknown = re.match(r"unknown key '([^']+)", message)  # the other keys of such a message are proposals
    found = [unknown[1]] if unknown else re.findall(r"^[^ :']+|\b[a-z_]+(?:\.[a-z_]+)+\b", message)
    keys = [key.split(".") for key in found]
    for wanted in (keys, [key[:-1] for key in keys[:1]]):  # last, of a key that nobody set, who chose its section
        for name, tree in reversed(layers):
            if any(key and _has(tree, key) for key in wanted):
                return name
    return ""


def _has(tree: Any, key: list[str]) -> bool:
    return not key or (isinstance(tree, dict) and key[0] in tree and _has(tree[key[0]], key[1:]))


def _default_text(default: Any) -> str:
    """A default as YAML takes it."""
    return json.dumps(default) if default is None or isinstance(default, bool) else str(default)


def documentation(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """(key, default, description) of every field, depth first."""
    seen: set[str] = set()
    for name, field in model.model_fields.items():
        key = prefix + name
        default = "required" if field.is_required() else field.get_default()
        shown = "" if isinstance(default, BaseModel) else _default_text(default)
        description = field.description or ("Which kind; the other keys depend on it." if name == "kind" else "")
        yield key, shown, " ".join(description.split())
        for section in _sections(field.annotation):
            for row in documentation(section, key + "."):
                if row[0] not in seen:
                    seen.add(row[0])
                    yield row

"""Broken configs: the language of files and overrides."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from tests.campaign.harness import CONFIG, Case

Edit = Callable[[Path], object]


def text(content: str | bytes, name: str = "c.yaml") -> Edit:
    """Writes the file `name` anew."""
    data = content if isinstance(content, bytes) else content.encode("utf-8", "surrogateescape")
    return lambda folder: (folder / name).write_bytes(data)


def more(content: str, name: str = "c.yaml") -> Edit:
    """A config that inherits the good one, with `content`."""

    def edit(folder: Path) -> None:
        (folder / "c.yaml").rename(folder / "base.yaml")
        (folder / name).write_bytes(b"inherits: base.yaml\n" + content.encode("utf-8", "surrogateescape"))

    return edit


# --- files -----------------------------------------------------------------------------------------------------------

FILES: list[tuple[str, Edit, tuple[str, ...]]] = [
    ("empty", text(""), ("c.yaml", "model: required", "task: required")),
    ("only comments", text("# nothing\n"), ("c.yaml", "model: required")),
    ("a list", text("- a\n- b\n"), ("c.yaml", "key: value")),
    ("a number", text("3\n"), ("c.yaml", "key: value")),
    ("a word", text("hello\n"), ("c.yaml", "key: value")),
    ("null", text("null\n"), ("c.yaml", "key: value")),
    ("two documents", text("seed: 1\n---\nseed: 2\n"), ("c.yaml", "YAML")),
    ("bracket open", text("train: {steps: [\n"), ("c.yaml", "YAML")),
    ("tab", text("train:\n\tsteps: 3\n"), ("c.yaml", "YAML")),
    ("two colons", text("a: b: c\n"), ("c.yaml", "YAML")),
    ("key twice", text("seed: 1\nseed: 2\n"), ("c.yaml", "seed")),
    ("UTF-16", text("seed: 1\n".encode("utf-16")), ("c.yaml",)),
    ("Latin-1", text(b"# caf\xe9\nseed: 1\n"), ("c.yaml", "YAML")),
    ("binary", text(bytes(range(256))), ("c.yaml", "YAML")),
    ("null bytes", text(b"seed: 1\n\0\0\0"), ("c.yaml", "YAML")),
    ("python tag", text("run: !!python/object:os.x {}\n"), ("c.yaml", "YAML")),
    ("unknown tag", text("seed: !mine 3\n"), ("c.yaml", "YAML")),
    ("alias without anchor", text("seed: *a\n"), ("c.yaml", "YAML")),
    ("anchor that holds itself", text("a: &a [*a]\n"), ("c.yaml",)),
    ("mapping that holds itself", text("train: &a {steps: *a}\n"), ("c.yaml",)),
    ("deep lists", text("seed: " + "[" * 5000 + "]" * 5000), ("c.yaml",)),
    ("deep mappings", text("a: " + "{b: " * 3000 + "1" + "}" * 3000), ("c.yaml",)),
    ("deep, closed late", text("".join(" " * i + "a:\n" for i in range(1500))), ("c.yaml",)),
    ("billion laughs", text("a: &a [1,1]\n" + "".join(f"{b}: &{b} [*{a},*{a}]\n" for a, b in zip("abcdefghijklmnopqrs", "bcdefghijklmnopqrst", strict=True))), ("c.yaml",)),
    ("a folder", lambda f: ((f / "c.yaml").unlink(), (f / "c.yaml").mkdir()), ("c.yaml",)),
    ("missing", lambda f: (f / "c.yaml").unlink(), ("c.yaml", "no such config file")),
    ("dangling link", lambda f: ((f / "c.yaml").unlink(), (f / "c.yaml").symlink_to("gone")), ("c.yaml",)),
    ("link to itself", lambda f: ((f / "c.yaml").unlink(), (f / "c.yaml").symlink_to("c.yaml")), ("c.yaml",)),
    ("number as key", more("3: 4\n"), ("c.yaml", "unknown key '3'")),
    ("null as key", more("null: 4\n"), ("c.yaml",)),
    ("list as key", more("? [a, b]\n: 4\n"), ("c.yaml",)),
    ("date as key", more("2020-01-01: 4\n"), ("c.yaml", "2020")),
    ("date as value", more("seed: 2020-01-01\n"), ("c.yaml", "seed")),
    ("bytes as value", more("seed: !!binary aGVsbG8=\n"), ("c.yaml", "seed")),
    ("set as value", more("seed: !!set {a, b}\n"), ("c.yaml", "seed")),
    ("surrogate in a value", more('run: {name: "a\\ud800"}\n'), ("c.yaml", "Unicode")),
    ("a path with a surrogate", more('model: {path: "a\\ud800"}\n'), ("c.yaml", "Unicode")),
    ("null byte in a path", more('model: {path: "a\\0b"}\n'), ("model.path",)),
    ("null byte in run.dir", more('run: {dir: "a\\0b"}\n'), ("run.dir",)),
    ("null byte in a data path", more('task: {train_path: "a\\0b"}\n'), ("task.train_path",)),
    ("missing value marker", more("seed: ???\n"), ("c.yaml", "seed")),
    ("missing value marker in a section", more("train: ???\n"), ("c.yaml", "train")),
    ("byte order mark", more("\ufeffseed: 3\n"), ("c.yaml",)),
]  # fmt: skip

INHERITS: list[tuple[str, Edit, tuple[str, ...]]] = [
    ("itself", text("inherits: c.yaml\n"), ("c.yaml", "inherits itself")),
    ("itself through ..", text("inherits: x/../c.yaml\n"), ("inherits",)),
    ("itself through .", text("inherits: ./c.yaml\n"), ("c.yaml", "inherits itself")),
    ("itself through a link", lambda f: (text("inherits: d.yaml\n")(f), (f / "d.yaml").symlink_to("c.yaml")), ("inherits itself",)),
    ("a loop of two", lambda f: (text("inherits: d.yaml\n")(f), text("inherits: c.yaml\n", "d.yaml")(f)), ("c.yaml", "d.yaml", "inherits itself")),
    ("a missing file", text("inherits: gone.yaml\n"), ("gone.yaml", "no such config file")),
    ("a folder", text("inherits: model\n"), ("model", "no such config file")),
    ("a list", text("inherits: [a.yaml, b.yaml]\n"), ("c.yaml", "inherits", "one")),
    ("a mapping", text("inherits: {a: b}\n"), ("c.yaml", "inherits", "one")),
    ("a number", text("inherits: 3\n"), ("c.yaml", "inherits", "one")),
    ("true", text("inherits: true\n"), ("c.yaml", "inherits", "one")),
    ("empty text", text("inherits: ''\n"), ("c.yaml", "inherits")),
    ("an interpolation", text("inherits: ${base}.yaml\nbase: base\n"), ("c.yaml", "inherits")),
    ("an environment variable", text("inherits: ${oc.env:NO_SUCH}.yaml\n"), ("c.yaml", "inherits")),
    ("a missing marker", text("inherits: ???\n"), ("c.yaml", "inherits")),
    ("a broken file", lambda f: (text("inherits: d.yaml\n")(f), text("a: [\n", "d.yaml")(f)), ("d.yaml", "YAML")),
    ("a name of 5,000 characters", text(f"inherits: {'x' * 5000}.yaml\n"), ("File name too long",)),
    ("a chain of 500 files", lambda f: (text("inherits: 0.yaml\n")(f), [text(f"inherits: {i + 1}.yaml\n", f"{i}.yaml")(f) for i in range(500)], ), ("500.yaml", "no such config file")),
    ("a typo in an inherited file", lambda f: (more("inherits: 1\n")(f), (f / "base.yaml").write_text((f / "base.yaml").read_text()[:-1] + ', "sead": 1}'), text("inherits: base.yaml\n")(f)), ("base.yaml", "'sead'", "seed")),
    ("a typo in an inherited section", lambda f: (text("inherits: d.yaml\n")(f), text(json.dumps(CONFIG | {"train": {"stepz": 3}}), "d.yaml")(f)), ("d.yaml", "'train.stepz'", "train.steps")),
    ("a bad value in an inherited file", lambda f: (text("inherits: d.yaml\n")(f), text(json.dumps(CONFIG | {"seed": "x"}), "d.yaml")(f)), ("d.yaml", "seed")),
    ("bad values in both", lambda f: (text("inherits: d.yaml\ntrain: {steps: x}\n")(f), text(json.dumps(CONFIG | {"seed": "x"}), "d.yaml")(f)), ("c.yaml", "d.yaml", "seed", "train.steps")),
]  # fmt: skip

OVERRIDES: list[tuple[str, tuple[str, ...], tuple[str, ...]]] = [
    ("no value", ("train.steps",), ("'train.steps'", "key=value")),
    ("no key", ("=3",), ("'=3'", "key=value")),
    ("only =", ("=",), ("key=value",)),
    ("empty", ("",), ("key=value",)),
    ("nothing after =", ("train.steps=",), ("'train.steps='", "key=value")),
    ("a comment", ("train.steps=#3",), ("'train.steps=#3'",)),
    ("a comment in a name", ("run.name=#1",), ("'run.name=#1'",)),
    ("a key that starts with #", ("#train.steps=3",), ("#train",)),
    ("bracket open", ("seed=3", "rollout.ignore=[a,"), ("'rollout.ignore=[a,'",)),
    ("brace open", ("train={steps: 3",), ("'train={steps: 3'",)),
    ("quote open", ("run.name='a",), ("override 'run.name='a'", "YAML")),
    ("index of a list", ("eval.every=1", "mismatch.token_bounds.0=0.5"), ("mismatch.token_bounds", "list")),
    ("index of a list below a mapping", ("tracking.trackers.0=jsonl",), ("tracking.trackers", "list")),
    ("bracketed index", ("tracking.trackers[0]=jsonl",), ("tracking.trackers",)),
    ("key below a value", ("train.steps.x=3",), ("train.steps",)),
    ("key below null", ("model.build.x.y=3",), ("model.build",)),
    ("two dots", ("train..steps=3",), ("train..steps",)),
    ("a dot in front", (".train.steps=3",), (".train.steps",)),
    ("a dot at the end", ("train.steps.=3",), ("train.steps.",)),
    ("a section as a number", ("train=3",), ("train:",)),
    ("a section as a list", ("train=[1]",), ("train:",)),
    ("a section as null", ("train=null",), ("train:",)),
    ("an unknown key", ("train.stepz=3",), ("'train.stepz'", "'train.steps'")),
    ("an unknown section", ("trian.steps=3",), ("'trian", "'train")),
    ("an unknown key of a kind", ("task.levels=[2]",), ("'task.levels'",)),
    ("a key far from any", ("qqqqqqqqqqqqqqqqqqqqqqq=3",), ("'qqqqqqqqqqqqqqqqqqqqqqq'", "qarl config keys")),
    ("name that reads as a number", ("run.name=007",), ("run.name", "quote")),
    ("name that reads as true", ("run.name=yes_",), ()),
    ("name that is true", ("run.name=true",), ("run.name", "quote")),
    ("name that is a float", ("run.name=1e3",), ("run.name", "quote")),
    ("name that is a date", ("run.name=2026-01-01",), ()),
    ("path that reads as a number", ("model.path=123",), ("model.path", "quote")),
    ("interpolation of nothing", ("run.name=${nothing}",), ("run.name", "nothing")),
    ("interpolation of a variable", ("run.name=${oc.env:NO_SUCH_HERE}",), ("NO_SUCH_HERE",)),
    ("interpolation open", ("run.name=${",), ("run.name",)),
    ("interpolation of itself", ("run.name=${run.name}",), ("run.name",)),
    ("interpolation in a loop", ("run.name=${run.dir}", "run.dir=${run.name}"), ("run.",)),
    ("unknown resolver", ("run.name=${mine:3}",), ("mine",)),
    ("interpolation of a section", ("run.name=${train}",), ("run.name",)),
    ("a very long value", (f"run.name={'x' * 300}",), ("run.name",)),
    ("a very long path", (f"run.dir={'x/' * 2500}",), ("run.dir", "longer")),
    ("a very long model path", (f"model.path={'x' * 5000}",), ("model.path", "longer")),
    ("a very long data path", (f"task.train_path={'x' * 5000}",), ("task.train_path", "longer")),
    ("a huge number", (f"train.steps={'9' * 400}",), ("train.steps",)),
    ("a huge number of 5,000 digits", (f"train.steps={'9' * 5000}",), ("train.steps",)),
    ("deep", (".".join("a" * 800) + "=1",), ("a.a.a", "nested too deeply")),
    ("deep value", ("seed=" + "[" * 2000 + "]" * 2000,), ("seed",)),
    ("inherits", ("inherits=c.yaml",), ("inherits",)),
    ("line break in a value", ("run.name=a\nb",), ("run.name",)),
    ("a flag behind", ("train.steps=2", "-x"), ()),
    ("a misspelt option", ("--dryrun",), ("--dryrun",)),
    ("a surrogate", ("run.name=a\udc80",), ("run.name",)),
    ("a surrogate in a key", ("a\udc80=3",), ("override", "no text")),
]

GOOD: list[tuple[str, Edit, tuple[str, ...]]] = [
    ("the good config", text(json.dumps(CONFIG)), ()),
    ("an empty section", more(""), ("objective={}", "task={}")),
    ("an override with =", more(""), ("tracking.wandb_group=a=b",)),
    ("a later override wins", more(""), ("seed=1", "seed=2")),
    ("a name in quotes", more(""), ("run.name='007'",)),
    ("a # within a value", more(""), ("tracking.wandb_group=a#b",)),
    ("a # in quotes", more(""), ("tracking.wandb_group='#b'",)),
    ("null in quotes", more(""), ("tracking.wandb_group='null'",)),
    ("a comment behind a value", more(""), ("tracking.wandb_group=a #b",)),
    ("null where it may be", more(""), ("mismatch.stop_above=null",)),
    ("interpolation", more(""), ("tracking.wandb_project=${run.name}-x",)),
    ("dtype bf16", more(""), ("model.dtype=bf16",)),
    ("dtype fp32", more(""), ("model.dtype=fp32",)),
    ("dtype float", more(""), ("model.dtype=float",)),
    ("windows line ends", more("seed: 3\r\n"), ()),
    ("byte order mark", text(b"\xef\xbb\xbf" + json.dumps(CONFIG).encode()), ()),
    ("a name of 200 characters", more(""), (f"run.name={'x' * 200}",)),
    ("braces in a template", more("task: {prompt_template: 'Q {question} {{x}} \\frac{1}{2}'}\n"), ()),
    ("an escaped interpolation", more("task: {prompt_template: '\\${x} {question}'}\n"), ()),
]

HINTS: list[tuple[str, tuple[str, ...]]] = [
    ("model.dtype=half", ("model.dtype", "float16", "bfloat16")),
    ("model.dtype=fp16", ("model.dtype", "float16", "bfloat16")),
    ("model.dtype=float16", ("model.dtype", "bfloat16")),
    ("model.dtype=int8", ("model.dtype", "bfloat16")),
    ("rollout.scheme=w8a8", ("rollout.scheme", "w8a8_int8")),
    ("rollout.scheme=int8", ("rollout.scheme", "w8a8_int8")),
    ("rollout.scheme=W8A8_INT8", ("rollout.scheme", "w8a8_int8")),
    ("objective.kind=ppo", ("objective.kind", "tbpo", "grpo")),
    ("objective.kind=3", ("objective.kind", "tbpo")),
    ("objective=tbpo", ("objective", "kind")),
    ("objective=null", ("objective", "kind")),
    ("task.kind=sort", ("task.kind", "sorting")),
    ("task=dataset", ("task", "kind")),
    ("pool.augment.validator.kind=x", ("pool.augment.validator.kind", "program")),
    ("pool.augment.validator=vote", ("pool.augment.validator", "kind")),
    ("run.name=a/b", ("run.name", "begins with a letter or digit")),
    ("run.name=.hidden", ("run.name", "begins with a letter or digit")),
    ("run.name=..", ("run.name",)),
    ("train.steps=1_000.5", ("train.steps",)),
    ("train.steps=10.0", ("train.steps",)),
    ("train.steps=1e2", ("train.steps", "100")),
    ("learner.optimizer.lr=1e-6x", ("learner.optimizer.lr",)),
    ("learner.optimizer.lr=.inf", ("learner.optimizer.lr",)),
    ("learner.optimizer.lr=.nan", ("learner.optimizer.lr",)),
    ("tracking.progress=1", ("tracking.progress",)),
    ("rollout.ignore=lm_head", ("rollout.ignore", "list")),
    ("cluster.address=3", ("cluster.address", "quote")),
]

CASES = [
    *(Case("config file", name, words, edit=edit) for name, edit, words in FILES),
    *(Case("inherits", name, words, edit=edit) for name, edit, words in INHERITS),
    *(
        Case("override", name, words, settings, is_good=not words and name.startswith("name"))
        for name, settings, words in OVERRIDES
    ),
    *(Case("good config", name, (), settings, edit, is_good=True) for name, edit, settings in GOOD),
    *(Case("hint", setting, words, (setting,)) for setting, words in HINTS),
]

"""Rewards and environments that cannot judge: every kind with wrong settings, functions that break."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.campaign.harness import Case

Words = tuple[str, ...]


def judge(more: str = "", url: str = "http://127.0.0.1:1/v1") -> str:
    """A judge at an address where nobody answers, with `more` settings."""
    return f"[{{kind: judge, settings: {{base_url: '{url}', model: m, template: '{{response}}'{more}}}}}]"


COMPONENTS: list[tuple[str, Words]] = [
    ("3", ("reward.components", "list")),
    ("{kind: exact}", ("reward.components", "list")),
    ("[exact]", ("reward.components",)),
    ("[3]", ("reward.components",)),
    ("[{}]", ("reward.components", "kind")),
    ("[{kind: nothing}]", ("reward.components", "kind", "'exact'")),
    ("[{kind: exact, weigth: 2}]", ("weigth", "weight")),
    ("[{kind: exact, name: 'a b'}]", ("reward.components", "name")),
    ("[{kind: exact, weight: x}]", ("reward.components", "weight")),
    ("[{kind: exact, weight: .nan}]", ("reward.components", "weight")),
    ("[{kind: exact, weight: 0}]", ("reward.components", "weight")),
    ("[{kind: exact}, {kind: exact}]", ("reward.components", "'exact'")),
    ("[{kind: exact, settings: {a: 1}}]", ("reward.components", "settings.a")),
    ("[{kind: exact, settings: 3}]", ("reward.components", "settings")),
    ("[{kind: exact, sources: web}]", ("reward.components", "sources", "list")),
    ("[{kind: exact, sources: [web]}]", ("reward.components", "data_source")),
    ("[{kind: regex}]", ("reward.components", "pattern")),
    ("[{kind: regex, settings: {pattern: '('}}]", ("reward.components", "pattern")),
    ("[{kind: regex, settings: {pattern: 3}}]", ("reward.components", "pattern")),
    ("[{kind: regex, settings: {patern: a}}]", ("patern", "pattern")),
    ("[{kind: choice, settings: {letters: A}}]", ("letters",)),
    ("[{kind: choice, settings: {letters: ab}}]", ("letters",)),
    ("[{kind: numeric, settings: {absolute: -1}}]", ("absolute",)),
    ("[{kind: numeric, settings: {relative: .inf}}]", ("relative",)),
    ("[{kind: format, settings: {tags: []}}]", ("tags",)),
    ("[{kind: format, settings: {tags: ['a b']}}]", ("tags",)),
    ("[{kind: format, settings: {tags: think}}]", ("tags", "list")),
    ("[{kind: length, settings: {shortest: 5, longest: 3}}]", ("longest", "shortest")),
    ("[{kind: length, settings: {shortest: -1}}]", ("shortest",)),
    ("[{kind: exact}, {kind: overlong, settings: {limit: 16}}]", ("cache",)),
    ("[{kind: exact}, {kind: overlong, settings: {limit: 8, cache: 16}}]", ("cache", "limit")),
    ("[{kind: overlong, settings: {limit: 16, cache: 4}}]", ("reward.success", "'overlong'")),
    ("[{kind: repetition}]", ("reward.success", "'repetition'")),
    ("[{kind: exact}, {kind: repetition, settings: {n: 0}}]", ("n",)),
    ("[{kind: code, settings: {python: gone}}]", ("code", "gone")),
    ("[{kind: code, settings: {python: c.yaml}}]", ("code", "c.yaml")),
    ("[{kind: code, settings: {python: ''}}]", ()),
    ("[{kind: code, settings: {timeout_s: 0}}]", ("timeout_s",)),
    ("[{kind: code, settings: {memory_mib: 1}}]", ("memory_mib",)),
    ("[{kind: code, settings: {tests: 3}}]", ("tests",)),
    ("[{kind: judge}]", ("base_url", "model", "template")),
    (judge(url="ftp://x"), ("base_url",)),
    ("[{kind: judge, settings: {base_url: 'http://x', model: m, template: hello}}]", ("template", "{response}")),
    (judge(", pattern: score"), ("pattern", "one group")),
    (judge(", pattern: '('"), ("pattern",)),
    (judge(", lowest: 5, highest: 5"), ("lowest", "highest")),
    (judge(", concurrency: 0"), ("concurrency",)),
    (judge(", api_key_env: NO_SUCH_KEY"), ("NO_SUCH_KEY",)),
    (judge(", cache: model"), ("cache", "model")),
    (judge(", cache: gone/a.sqlite"), ("judge",)),
    (judge(", cache: train.jsonl"), ("judge",)),
    (judge(), ("127.0.0.1:1",)),
    (judge(url="http://"), ("base_url",)),
    (judge(url="http://x:99999"), ("99999",)),
    ("[{kind: http}]", ("url",)),
    ("[{kind: http, settings: {url: nonsense}}]", ("url",)),
    ("[{kind: http, settings: {url: 'http://127.0.0.1:1'}}]", ("127.0.0.1:1",)),
    ("[{kind: http, settings: {url: 'http://no.such.host.invalid'}}]", ("no.such.host.invalid",)),
    ("[{kind: http, settings: {url: 'http://a b'}}]", ("http://a b",)),
    ("[{kind: http, settings: {url: 'http://127.0.0.1:1', api_key_env: NO_SUCH_KEY}}]", ("NO_SUCH_KEY",)),
    ("[{kind: reasoning_gym}]", ("reasoning_gym",)),
    ("[{kind: custom}]", ("function",)),
    ("[{kind: custom, settings: {function: 'gone.py:f'}}]", ("function", "gone.py")),
    ("[{kind: custom, settings: {function: 'mine.py:gone'}}]", ("function", "gone")),
    ("[{kind: custom, settings: {function: 'mine.py:one', scope: all}}]", ("scope", "'sample'")),
    ("[{kind: custom, settings: {function: 'mine.py:one', scope: group}}]", ("function", "one(responses)")),
    ("[{kind: custom, settings: {function: 'mine.py:one', at_once: 0}}]", ("at_once",)),
    ("[{kind: custom, settings: {function: 'mine.py:one', kwargs: {a: 1}}}]", ("function", "one(")),
    ("[{kind: custom, settings: {function: 'mine.py:one', kwargs: [1]}}]", ("kwargs",)),
    ("[{kind: custom, settings: {function: 'mine.py:few'}}]", ("function", "few(")),
    ("[{kind: custom, settings: {function: 'mine.py:number'}}]", ("function", "not a function")),
    ("[{kind: custom, settings: {function: 'broken.py:f'}}]", ("function", "broken.py")),
    ("[{kind: custom, settings: {function: 'exits.py:f'}}]", ("function", "exits.py")),
    ("[{kind: custom, settings: {function: 'typo.py:f'}}]", ("function", "typo.py")),
]

REWARDS: list[tuple[Words, Words]] = [
    (("reward.kind=regex",), ("reward.kind", "regex", "reward.components")),
    (("reward.kind=judge",), ("reward.kind", "judge", "reward.components")),
    (("reward.kind=math", "reward.components=[{kind: exact}]"), ("reward.kind", "reward.components")),
    (("reward.success=nothing",), ("reward.success", "'nothing'", "exact")),
    (("reward.components=[{kind: exact, sources: [a]}, {kind: math}]", "reward.success=exact"), ("reward.success",)),
    (("reward.components=[{kind: exact}, {kind: repetition}]", "reward.success=repetition"), ("reward.success",)),
    (("reward.kwargs={a: 1}",), ("reward.function",)),
    (("reward.num_workers=0",), ("reward.num_workers",)),
    (("reward.timeout_s=0",), ("reward.timeout_s",)),
    (("reward.components.0.weight=2",), ("reward.components", "list")),
    (("reward=exact",), ("reward",)),
    (("reward.kind=reasoning_gym",), ("reward.kind", "reasoning_gym")),
]  # fmt: skip

CUSTOM = "environment={kind: custom, function: 'mine.py:"
ENVIRONMENTS: list[tuple[Words, Words]] = [
    (("environment.kind=nothing",), ("environment.kind", "'calculator'")),
    (("environment=guess",), ("environment",)),
    (("environment.kind=custom",), ("environment.function",)),
    (("environment={kind: guess, function: 'mine.py:Good'}",), ("environment.function",)),
    (("environment.settings={a: 1}",), ("environment.kind", "settings")),
    (("environment.python=python3",), ("environment.kind", "python")),
    (("environment={kind: guess, settings: [1]}",), ("environment.settings",)),
    (("environment={kind: guess, settings: {guess: 3}}",), ("environment", "'guess'")),
    (("environment={kind: calculator, settings: {open: x}}",), ("environment", "'open'")),
    (("environment={kind: calculator, settings: {opening: 3}}",), ("environment",)),
    (("environment={kind: verifiers}",), ("environment", "verifiers")),
    (("environment={kind: guess, max_turns: 0}",), ("environment.max_turns",)),
    (("environment={kind: guess, max_turns: 100}",), ("learner.max_tokens_per_micro_batch", "environment.max_turns")),
    (("environment={kind: guess, num_workers: 0}",), ("environment.num_workers",)),
    (("environment={kind: guess, timeout_s: 0}",), ("environment.timeout_s",)),
    (("environment={kind: guess, python: gone}",), ("environment.python", "gone")),
    (("environment={kind: guess, python: c.yaml}",), ("environment.python", "c.yaml")),
    (("environment={kind: guess, python: model}",), ("environment.python", "model")),
    (("environment={kind: guess, python: 'true'}",), ("environment",)),
    (("environment={kind: guess, python: text.sh}",), ("text.sh",)),
    (("environment={kind: guess}", "reward.components=[{kind: math}]"), ("reward.components",)),
    (("environment={kind: guess, max_turns: 64}", "train.max_staleness=1", "rollout.partial=true"),
     ("learner.max_tokens_per_micro_batch", "train.max_staleness")),
    (("environment={kind: guess}", "pool.augment.per_step=1"), ("pool.augment.per_step",)),
    (("environment={kind: custom, function: 'gone.py:f'}",), ("environment.function", "gone.py")),
    (("environment={kind: custom, function: 'broken.py:f'}",), ("environment.function", "broken.py")),
    ((f"{CUSTOM}Gone'}}",), ("environment.function", "Gone")),
    ((f"{CUSTOM}Good', settings: {{a: 1}}}}",), ("environment.function", "Good(a=1)")),
    ((f"{CUSTOM}Needs'}}",), ("environment.function", "Needs()")),
    ((f"{CUSTOM}Raises'}}",), ("environment", "ZeroDivisionError")),
    ((f"{CUSTOM}RaisesAtReset'}}",), ("environment", "ZeroDivisionError")),
    ((f"{CUSTOM}GivesObject'}}",), ("environment",)),
    ((f"{CUSTOM}Exits'}}",), ("environment",)),
    ((f"{CUSTOM}Hangs', timeout_s: 1}}",), ("environment", "timed out")),
    ((f"{CUSTOM}number'}}",), ("environment.function", "not a function")),
    ((f"{CUSTOM}NoReset'}}",), ("environment", "reset")),
    ((f"{CUSTOM}one'}}",), ("environment",)),
]  # fmt: skip

GOOD: list[Words] = [
    ("reward.components=[{kind: exact, weight: 2}, {kind: math, weight: 0}, {kind: repetition, weight: 0.1}]",),
    ("reward.components=[{kind: custom, settings: {function: 'mine.py:one'}}]",),
    ("reward.components=[{kind: custom, settings: {function: 'mine.py:many', scope: batch, at_once: 4}}]",),
    ("task.source=web", "reward.components=[{kind: exact, sources: [web]}]"),
    ("environment={kind: guess, settings: {guesses: 2, below: 9}}", "rollout.stragglers.kind=return"),
    ("environment={kind: guess}", "train.max_staleness=1"),
    ("environment={kind: calculator}",),
    (f"{CUSTOM}Good'}}",),
]

MINE = """
number = 3
def one(text, finish_reason, answer): return 0.0
def few(text): return 0.0
def many(responses): return [0.0 for _ in responses]
class Good:
    def reset(self, prompt): return None
    def step(self, response): return None, 0.0, True
class Needs(Good):
    def __init__(self, size): pass
class Raises(Good):
    def __init__(self): 1 / 0
class RaisesAtReset(Good):
    def reset(self, prompt): 1 / 0
class GivesObject(Good):
    def reset(self, prompt): return object()
class Exits(Good):
    def reset(self, prompt):
        import os
        os._exit(3)
class Hangs(Good):
    def reset(self, prompt):
        import time
        time.sleep(100)
class NoReset:
    pass
"""


def functions(folder: Path) -> None:
    """Files with functions of the user's own, most of them wrong."""
    (folder / "mine.py").write_text(MINE)
    (folder / "broken.py").write_text("1 / 0\n")
    (folder / "exits.py").write_text("import sys\nsys.exit(3)\n")
    (folder / "typo.py").write_text("def f(:\n")
    (folder / "text.sh").write_text("hello")
    (folder / "text.sh").chmod(0o755)


def cases(kind: str, listed: list[tuple[Words, Words]], edit: Callable[[Path], object] = functions) -> list[Case]:
    return [
        Case(kind, " ".join(settings), words, settings, edit, is_good=not words, exit_code=(1, 2))
        for settings, words in listed
    ]


CASES = [
    *cases("component", [((f"reward.components={value}",), words) for value, words in COMPONENTS]),
    *cases("reward", REWARDS),
    *cases("environment", ENVIRONMENTS),
    *cases("good reward", [(settings, ()) for settings in GOOD]),
]

"""The documentation names what exists: links, files, functions and commands."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest

from launch import cli
from launch.arguments import read_config
from qarl.config.io import documentation, load_config
from qarl.hooks import load_function
from qarl.tasks import make_task
from tests.support.pages import PAGES, ROOT, commands, rule_of

PACKAGES = ("qarl", "rollout", "trainer", "rewards", "launch")
LINK = re.compile(r"\]\(([^)\s]+)\)")
REPOSITORY_PATH = re.compile(r"`((?:qarl|rollout|trainer|rewards|launch|configs|docs|tests)/[a-z0-9_./-]*)`")
INDEX_ROW = re.compile(r"\| (Where .*\?) \| `([^`]+)` \| `([^`]+)` \|")
SYMBOL = re.compile(r"`([A-Za-z_]+)`")
CONFIG_KEY = re.compile(r"`([a-z_]+(?:\.[a-z_]+)+)(?:=[^`\s]*|: [^`]*)?`")
YAML = re.compile(r"^```yaml\n(.*?)^```", re.MULTILINE | re.DOTALL)
SHOWN_FILE = re.compile(r"^`([a-z0-9_.]+)`:\n\n```\w+\n(.*?)^```", re.MULTILINE | re.DOTALL)
NOT_IN_ANCHORS = re.compile(r"[^\w\- ]")


def title(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def anchors(page: Path) -> set[str]:
    """Anchors of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {NOT_IN_ANCHORS.sub("", heading.lower()).replace(" ", "-") for heading in headings}


def defined_in(file: Path) -> set[str]:
    """Names at the top of a module, and `Class.method`."""
    found: set[str] = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
        assigned = node.targets if isinstance(node, ast.Assign) else []
        for target in [node.target] if isinstance(node, ast.AnnAssign) else assigned:
            found |= {name.id for name in ast.walk(target) if isinstance(name, ast.Name)}
    return found


@pytest.mark.parametrize("page", PAGES, ids=title)
def test_relative_links_resolve(page: Path) -> None:
    for link in LINK.findall(page.read_text()):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{title(page)}: {link}"
        assert not anchor or anchor in anchors(target), f"{title(page)}: {link}"


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=title)
def test_files_that_a_page_names_exist(page: Path) -> None:
    named = {path for path in REPOSITORY_PATH.findall(page.read_text()) if "/my_" not in path}  # the reader's own
    assert {path for path in named if not (ROOT / path).exists()} == set()


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=title)
def test_config_keys_that_a_page_names_exist(page: Path) -> None:
    known = {key for key, _, _ in documentation()}
    sections = {key.partition(".")[0] for key in known}
    files = (".py", ".md", ".json", ".jsonl", ".yaml", ".png", ".log")
    named = {key for key in CONFIG_KEY.findall(page.read_text()) if not key.endswith(files)}
    assert {key for key in named - known if key.partition(".")[0] in sections} == set()


@pytest.mark.parametrize(("page", "command"), [(page, command) for page in PAGES for command in commands(page)])
def test_commands_parse(page: Path, command: str) -> None:
    """The parser, and for commands with a shipped config its settings; nothing is started. `make docs-check` runs them,
    as far as a rule says so."""
    rule_of(command)
    words = shlex.split(command)[1:]
    if not command.startswith("qarl "):
        return
    args = cli._parser(words[0]).parse_args(words)
    shipped = ROOT / "configs" / f"{getattr(args, 'config', '')}.yaml"
    if words[0] == "sweep":  # the first of the values that each setting lists
        args.overrides = [item.partition(",")[0] for item in args.overrides]
    if getattr(args, "config", "") and shipped.is_file():
        read_config(args)


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=title)
def test_commands_within_text_parse(page: Path) -> None:
    """Those that have more than options, and no place for the reader's own."""
    found = re.findall(r"`qarl (\w[^` ]* [^`-][^`]*)`", page.read_text())
    for command in [command for command in found if not re.search(r"\b[A-Z]{2,}\b|\.\.\.", command)]:
        cli._parser(command.split()[0]).parse_args(shlex.split(command))


def test_the_recipes_name_what_exists() -> None:
    """A name in an item of CONTRIBUTING occurs in one of the files which that item names."""
    items = re.split(r"\n(?=\d\. |#|\n)", (ROOT / "CONTRIBUTING.md").read_text().partition("## Recipes")[2])
    found = 0
    for item in items:
        files = [ROOT / path for path in REPOSITORY_PATH.findall(item) if path.endswith(".py") and "/my_" not in path]
        text = "\n".join(file.read_text() for file in files)
        names = [name for name in SYMBOL.findall(item) if not name.startswith("my_")]
        assert {name for name in names if files and not re.search(rf"\b{name}\b", text)} == set(), item
        found += len(names) if files else 0
    assert found >= 15


@pytest.mark.parametrize("number", range(len(YAML.findall((ROOT / "docs/tasks.md").read_text()))))
def test_the_tasks_of_the_page_have_problems(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each config of docs/tasks.md, over the files that the page shows."""
    text = (ROOT / "docs/tasks.md").read_text()
    monkeypatch.chdir(tmp_path)
    for name, content in SHOWN_FILE.findall(text):
        (tmp_path / name).write_text(content)
    (tmp_path / "my.yaml").write_text(YAML.findall(text)[number])
    config = load_config("my.yaml")
    task = make_task(config.task, lambda text, turns=(): [len(text), len(turns)])
    train, heldout = task.load(0, 4, lambda line: None)
    assert train
    assert heldout
    assert all(prompt.answer for prompt in train)


def test_the_page_for_migrants_is_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "docs/migrating.md").read_text()
    monkeypatch.chdir(tmp_path)
    [config] = YAML.findall(text)
    (tmp_path / "my.yaml").write_text(config)
    assert load_config("my.yaml").train.prompts_per_step == 256
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "my_scores.py").write_text(
        "def compute_score(source, solution, truth, extra): return solution == truth"
    )
    [judging] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (tmp_path / "judge.py").write_text(judging)
    judge = load_function("judge.py:judge", "reward.function")
    assert [judge(text, "stop", "7", "sums", {"extra_info": None}) for text in ("7", "8")] == [1.0, 0.0]


def test_the_index_names_what_exists() -> None:
    rows = INDEX_ROW.findall((ROOT / "docs/architecture.md").read_text())
    assert len(rows) >= 10
    for question, file, name in rows:
        assert name in defined_in(ROOT / file), f"{question} {file} has no {name}"


def test_every_folder_has_a_line_in_the_tree() -> None:
    page = (ROOT / "docs/architecture.md").read_text()
    tree = page.partition("## Where things lie")[2].partition("###")[0]
    folders = {file.parent.name for package in PACKAGES for file in (ROOT / package).glob("**/*.py")}
    assert {folder for folder in folders if f"{folder}/" not in tree} == set()


@pytest.mark.parametrize("findings", sorted(ROOT.glob("docs/studies/*.findings.md")), ids=lambda path: path.stem)
def test_a_study_says_what_its_findings_say(findings: Path) -> None:
    """`qarl study NAME --report-only` writes the page anew, with them."""
    page = findings.with_name(findings.name.replace(".findings", ""))
    assert findings.read_text().strip() in page.read_text()

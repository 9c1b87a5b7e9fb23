"""The commands that the pages show, and how far each can be tried."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = sorted(page for pattern in ("*.md", "docs/**/*.md", ".github/**/*.md") for page in ROOT.glob(pattern))
CODE = re.compile(r"^```(?:bash|sh)?\n(.*?)^```|^ {4}([^\n]*)$", re.MULTILINE | re.DOTALL)
PROGRAMS = ("qarl ", "make ", "python ", "pytest ", "launch/", "source ", "docker ", "kubectl ", "sbatch ", "ray ")
SMALL = (
    "train.steps=2 train.prompts_per_step=8 learner.minibatches=2 task.levels=[2,3] model.build.sft.steps=100 "
    "eval.num_prompts=8 eval.final_num_prompts=8 eval.num_samples=2 run.dir=runs"
)
"""What makes a run of the sorting task short."""


class Rule(NamedTuple):
    """Commands that match `pattern` are run, with `change` after them, or are only parsed, or skipped, for a reason.

    What a command prints that is run must match `shows`.
    """

    pattern: str
    kind: Literal["run", "parse", "skip"]
    change: str = ""
    shows: str = ""


EXACT = r"max \|d log p\| +exactly 0 "
RULES = (
    Rule(r"source |make setup|make lint|make test|make quickstart", "skip", "the check itself, or CI, does it"),
    Rule(r"launch/ +", "skip", "a tree of folders"),
    Rule(r"\S* ?.*(HEAD|CONFIG|MODEL|NAME|HOST|RUN|JOB)\b", "parse", "has a place for the reader's own"),
    Rule(r"launch/cluster/ray_cluster\.sh ", "skip", "needs a cluster; pytest -m slow starts one"),
    Rule(r"qarl submit|ray |sbatch |kubectl |docker ", "skip", "needs a cluster, a cloud or a container daemon"),
    Rule(r"qarl train quickstart --dry-run", "run", f"{SMALL} run.name=dry", r"rollout worker 0: 0.5 CPU"),
    Rule(r"qarl train quickstart .*learner\.aligned=false", "run", SMALL, r"max \|d log p\| +\d"),
    Rule(r"qarl train quickstart .*learner\.numerics=portable", "run", SMALL, r"max \|d log p\| +"),
    Rule(r"qarl train quickstart", "run", SMALL, EXACT),
    Rule(
        r"qarl train (guess|calculator|three_tasks)",
        "run",
        "train.steps=1 eval.num_prompts=8 eval.final_num_prompts=8",
        EXACT,
    ),
    Rule(r"qarl train smollm2_gsm8k|qarl simulate recipes/", "parse", "minutes"),
    Rule(
        r"qarl sweep quickstart",
        "run",
        f"--seeds 0 --name shown train.group_size=8 {SMALL.removesuffix('run.dir=runs')}",
        r"lr_1e-4-seed0: (done|has ended before)",
    ),
    Rule(r"qarl chaos chaos --faults", "run", "--faults 1", r"0 lost, 0 doubled"),
    Rule(r"qarl chaos", "parse", "minutes"),
    Rule(r"qarl mismatch runs/quickstart", "run", "--num-sequences 8", r"w8a8_int8 .*exactly 0"),
    Rule(r"qarl doctor", "run", "", "good"),
    Rule(r"qarl plan", "run", "", "a training step is"),
    Rule(r"qarl simulate quickstart", "run", "", "idle"),
    Rule(r"qarl config", "run", "", r"(?m)^(train:|train\.steps = )"),
    Rule(r"qarl runs", "run", "", r"quickstart +done +2/2"),
    Rule(r"qarl compare", "run", "", r"held-out pass@1, last"),
    Rule(r"qarl report", "run", "", EXACT),
    Rule(r"qarl (trace|dashboard) runs/quickstart", "run", "", r"(trace\.json|workspace\.html)"),
    Rule(r"qarl eval runs/quickstart", "run", "", r"pass@1"),
    Rule(r"qarl export runs/quickstart", "run", "", r"exported"),
    Rule(r"make real|qarl (eval|fetch|study|mismatch|bench)", "parse", "minutes, or a download of a model"),
    Rule(r"python -m launch\.demo\.minimal", "run", SMALL, r"step 2/2 .*max \|d log p\| 0"),
    Rule(r"pytest -q tests/unit", "run", "", r"\d passed"),
    Rule(r"pytest -m (gpu|slow)|python -m (venv|tests\.)", "skip", "run by name, for minutes"),
)


def commands(page: Path) -> Iterator[str]:
    """Every command of a page's code blocks that begins with one of `PROGRAMS`, without its comment."""
    for block in map("".join, CODE.findall(page.read_text())):
        for line in block.splitlines():
            for part in line.partition(" #")[0].split(";"):
                if part.strip().startswith(PROGRAMS):
                    yield part.strip()


def rule_of(command: str) -> Rule:
    """The first rule for a command. Raises LookupError: there is none."""
    for rule in RULES:
        if re.match(rule.pattern, command):
            return rule
    raise LookupError(f"no rule in tests/support/pages.py for `{command}`")

"""Broken inputs, and how `qarl` answers them. `python -m tests.campaign` runs all of them and counts the answers.

Each area has a file `AREA_cases.py` with a list `CASES`. To add a kind of fault, append `Case`s there, or add a file of
that name: a case breaks one thing in a folder that holds a good config, data set and model, and says which words the
one line must have. The command runs in this process; in place of Ray, or of an engine, stands a flag, so that no case
costs much. `tests/campaign/test_sample.py` runs some cases of every area in the suite.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import signal
import stat
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

MOST_SECONDS = 20.0
"""CPU time that an answer may take."""
MOST_LINES, LONGEST_LINE = 3, 1000
CLASSES = ("right", "traceback", "silent", "late", "vague")
"""right: exit code 2 (or 1) and one line with the expected words, nothing changed on disk; or accepted where it should
be. traceback: any other exception. silent: exit code 0. late: refused after something was started or written, or after
`MOST_SECONDS`. vague: a line that is too long, several lines, noise beside them, not the expected words, or no hint."""
NEEDS_NO_HINT = re.compile(
    r"qarl[\w -]*: error: "  # argparse says what an argument may be
    r"|qarl: (override '|\S+\.yaml: )"  # a setting, and what it may be
    r"|qarl: [^ ]+:(row )?\d+: "  # a row, and what is wrong in it
    r"|.*(cannot read: |[Nn]o such file|not YAML: |not a JSON row: |a row is |string should )"  # the reason
    r"|.*: (Is a directory|File exists|Too many levels of symbolic links)$"  # the system's
)
"""Lines that say what to do by saying what is wrong."""


def nothing(folder: Path) -> None:
    """Leaves the input as it is."""


@dataclass(frozen=True)
class Case:
    """One broken input.

    Attributes:
        kind: kind of fault; the counts are by kind.
        name: what is broken.
        words: each must occur in the answer.
        settings: overrides, appended to `argv`.
        edit: breaks something in the folder, which is the working directory: `c.yaml`, `train.jsonl`, `heldout.jsonl`,
            `model/`.
        argv: the command.
        is_good: whether the input is right, however strange; it is then to be accepted.
        is_either: whether it may be refused or accepted: a random fault, which may hit what nobody reads.
        env: added to the environment.
        exit_code: of the refusal; one of these.
        may_write: whether the refused command may change files.
    """

    kind: str
    name: str
    words: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    edit: Callable[[Path], object] = nothing
    argv: tuple[str, ...] = ("train", "c.yaml")
    is_good: bool = False
    is_either: bool = False
    env: tuple[tuple[str, str], ...] = ()
    exit_code: tuple[int, ...] = (2,)
    may_write: bool = False


@dataclass
class Answer:
    """What a case led to."""

    case: Case
    verdict: str
    text: str = ""
    seconds: float = field(default=0.0, compare=False)

    def __str__(self) -> str:
        return f"{self.verdict:9s} {self.case.kind}: {self.case.name}\n    {self.text.strip()}"


class Started(BaseException):
    """In place of Ray, or of an engine: the checks before the start found nothing."""


class Hangs(BaseException):
    """The answer takes too long."""


CONFIG: dict[str, Any] = {
    "run": {"name": "r", "dir": "runs"},
    "model": {"path": "model"},
    "task": {"kind": "dataset", "train_path": "train.jsonl", "heldout_path": "heldout.jsonl", "chat": False},
    "train": {"steps": 2, "prompts_per_step": 4, "group_size": 2},
    "eval": {"num_prompts": 4, "final_num_prompts": 4, "num_samples": 1},
    "rollout": {"max_model_len": 64, "num_workers": 1, "num_cpus_per_worker": 0.1, "sampling": {"max_new_tokens": 16}},
    "learner": {"minibatches": 1, "num_ranks": 1, "num_threads": 1, "num_cpus_per_rank": 0.1},
    "cluster": {"device": "cpu"},
    "tracking": {"trackers": ["jsonl"]},
}
"""A config that is right, on the data and the model below."""


def rows(first: int, count: int) -> str:
    return "".join(json.dumps({"question": f"{i}=", "answer": str(i)}) + "\n" for i in range(first, first + count))


def make_site(folder: Path) -> None:
    """A good config with its data and a tiny random model, in `folder`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from launch.demo.tiny_model import make_tokenizer

    (folder / "c.yaml").write_text(json.dumps(CONFIG))
    (folder / "train.jsonl").write_text(rows(100, 64))
    (folder / "heldout.jsonl").write_text(rows(1000, 16))
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 128}
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": True}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3", **shape, **heads, **tokens))
    model.bfloat16().save_pretrained(folder / "model")
    make_tokenizer(64).save_pretrained(folder / "model")


@contextlib.contextmanager
def site() -> Iterator[Path]:
    """A folder with the good input, which every case gets a copy of."""
    with tempfile.TemporaryDirectory() as folder:
        make_site(Path(folder))
        yield Path(folder)


def answer(case: Case, good: Path) -> Answer:
    """Break a copy of `good` as `case` says, run the command there, and judge what it says."""
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent, "site")
        shutil.copytree(good, folder, symlinks=True)
        before = os.getcwd()
        os.chdir(folder)
        try:
            case.edit(folder)
            was, start = _tree(folder), time.process_time()
            code, out, error = _run([*case.argv, *case.settings], dict(case.env))
            seconds = time.process_time() - start
            return Answer(case, *_judge(case, code, out, error, seconds, _tree(folder) != was), seconds=seconds)
        finally:
            os.chdir(before)
            for path in folder.rglob("*"):  # a case may have taken rights away
                if not path.is_symlink() and path.is_dir():
                    path.chmod(0o755)


def _run(argv: list[str], env: dict[str, str]) -> tuple[int | BaseException, str, str]:
    """Exit code, or the exception that left `main`; standard output and standard error."""
    from launch import cli, train  # noqa: F401  # patched below
    from launch.tools.evaluation import evaluate  # noqa: F401

    out, error = io.StringIO(), io.StringIO()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGALRM)}
    signal.signal(signal.SIGALRM, _alarm)
    signal.alarm(120)
    try:
        with (
            patch.dict(os.environ),
            patch("launch.train.connect", side_effect=Started),
            patch("launch.tools.evaluation.evaluate._engine", side_effect=Started),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(error),
        ):
            for name in ("QARL_TRACEBACK", "WANDB_MODE"):
                os.environ.pop(name, None)
            os.environ.update(env)
            code: int | BaseException = cli.main(argv)
    except SystemExit as exit_:  # argparse
        code = int(exit_.code or 0)
    except (Exception, Started, Hangs) as raised:  # noqa: BLE001  # this is what is looked for
        code = raised
    finally:
        signal.alarm(0)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return code, out.getvalue(), error.getvalue()


def _alarm(*_: object) -> None:
    raise Hangs


def _judge(case: Case, code: int | BaseException, out: str, error: str, seconds: float, wrote: bool) -> tuple[str, str]:
    if isinstance(code, Hangs) or seconds > MOST_SECONDS:
        return "late", f"{seconds:.0f} s: {error}"
    if isinstance(code, BaseException) and not isinstance(code, Started):
        return "traceback", "".join(traceback.format_exception(code)[-2:])
    missing = [word for word in case.words if word not in error and not (case.is_good and word in out)]
    if isinstance(code, Started) or code == 0:
        if case.is_either:
            return "right", error
        if case.is_good:
            return ("vague", f"lacks {missing}: {out}{error}") if missing else ("right", error)
        return ("late" if isinstance(code, Started) else "silent"), out[-300:] + error
    if case.is_good:
        return "vague", f"refused although right: {error}"
    if code not in case.exit_code:
        return "vague", f"exit code {code}: {error}"
    lines = error.splitlines()
    own = [line for line in lines if line.startswith("qarl")]
    noise = [line for line in lines if line not in own and not line.startswith(("usage:", " "))]
    if noise or not 1 <= len(own) <= MOST_LINES or any(len(line) > LONGEST_LINE for line in own):
        return "vague", f"{len(own)} lines, {len(noise)} others: {error}"
    if missing:
        return "vague", f"lacks {missing}: {error}"
    if any("; " not in line and not NEEDS_NO_HINT.match(line) for line in own):
        return "vague", f"no hint: {error}"
    if wrote and not case.may_write:
        return "late", f"files changed: {error}"
    return "right", error


def _tree(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and mode of every file and folder."""
    stats = {str(path): path.lstat() for path in folder.rglob("*") if "__pycache__" not in path.parts}
    return {path: (0 if stat.S_ISDIR(s.st_mode) else s.st_size, s.st_mode) for path, s in stats.items()}

"""Commands that look at a run or a model: their arguments, and folders that something has damaged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.campaign.harness import Case
from tests.campaign.model_cases import damages
from tests.campaign.reward_cases import Words, functions
from tests.campaign.run_cases import killed_run

Edit = Callable[[Path], object]
RUN = "runs/r"


def ended_run(folder: Path) -> None:
    """A run that has ended: metrics, samples, a summary, a final model."""
    killed_run(folder)
    run = folder / RUN
    scores = {"reward/mean": 0.5, "eval/pass@1": 0.25, "mismatch/logp_abs_max": 0.0}
    (run / "metrics.jsonl").write_text("".join(json.dumps({"step": step, **scores}) + "\n" for step in range(6)))
    row = {"step": 1, "prompt": "7=", "response": "7", "reward": 1.0, "tokens": ["7"], "logp": [-0.5]}
    (run / "samples.jsonl").write_text(json.dumps(row) + "\n")
    times = {"train_seconds": 1.0, "tokens_per_s": 1.0, "eval_before": {"pass@1": 0.1}, "eval_after": {"pass@1": 0.2}}
    summary = {"run": "r", "scheme": "w8a8_int8", "kernels": [], "steps": 6, "rollouts": 48, **times}
    (run / "summary.json").write_text(json.dumps(summary))
    shutil.copytree(folder / "model", run / "final")


def then(*edits: Edit) -> Edit:
    return lambda folder: [edit(folder) for edit in (ended_run, *edits)]


def line(name: str, row: Any) -> Edit:
    """One more row in a log of the run."""

    def edit(folder: Path) -> None:
        with (folder / RUN / name).open("a") as file:
            file.write(json.dumps(row) + "\n")

    return edit


def write(name: str, data: str | bytes) -> Edit:
    return lambda folder: (folder / name).write_bytes(data if isinstance(data, bytes) else data.encode())


ODD: tuple[Any, ...] = ("x", None, [1], {"a": 1}, {"counts": 3, "edges": "x"}, True, 1e308, 10**400, "nan", "-inf", "")
"""Values of a metric."""
ODD_SAMPLES: tuple[Any, ...] = (
    *({"tokens": 3}, {"tokens": "abc"}, {"tokens": [1, None]}, {"response": 3}, {"reward": "x"}, {"logp": [None]}),
    *({"prompt": {"a": 1}}, {"response": "</script><script>"}, {"tokens": None, "response": None}),
)
LOOKS: dict[str, Words] = {
    "report": ("report", RUN),
    "report of two": ("report", RUN, RUN, "--out", "two.html"),
    "runs": ("runs",),
    "runs --json": ("runs", "--json"),
    "dashboard": ("dashboard", RUN, "--entity", "me", "--json", "w.json"),
}


def readers() -> list[Case]:
    """Every command that reads a run, on a run whose files are damaged in every way."""
    found = []
    edits: list[tuple[str, Edit]] = []
    for name in ("metrics.jsonl", "summary.json", "samples.jsonl", "config.yaml"):
        edits += [(f"{name}: {title}", edit) for title, edit in damages(f"{RUN}/{name}")]
    for value in ODD:
        edits.append((f"reward {value!r:.20}", line("metrics.jsonl", {"step": 6, "reward/mean": value})))
        edits.append((f"accuracy {value!r:.20}", line("metrics.jsonl", {"step": 6, "eval/pass@1": value})))
    edits += [(f"sample {row}", line("samples.jsonl", {"step": 6, **row})) for row in ODD_SAMPLES]
    for steps in ("x", [1], -3, 10**30, None):
        edits.append((f"steps {steps!r}", write(f"{RUN}/config.yaml", json.dumps({"train": {"steps": steps}}))))
    edits.append(("train a list", write(f"{RUN}/config.yaml", "train: [1]\n")))
    for number, (title, edit) in enumerate(edits):
        for looked, (what, argv) in enumerate(LOOKS.items()):
            if looked == 0 or (number + looked) % 3 == 0:
                found.append(
                    Case("damaged run", f"{what}: {title}", edit=then(edit), argv=argv, is_either=True,
                         exit_code=(1, 2), may_write=True)
                )  # fmt: skip
    return found


LONG = "x" * 5000
PLACES: dict[str, tuple[Words, ...]] = {
    "report": (("report",), ("report", RUN, "--out")),
    "runs": (("runs",),),
    "dashboard": (("dashboard", "--entity", "me"), ("dashboard", RUN, "--entity", "me", "--json")),
    "doctor": (("doctor", "--dir"),),
    "eval": (("eval",), ("eval", RUN, "--model"), ("eval", RUN, "--out")),
    "export": (("export", RUN), ("export",)),
    "mismatch": (("mismatch",), ("mismatch", "model", "--prompts"), ("mismatch", "model", "--stale-model")),
    "split-outliers": (("split-outliers", "--channels", "1", "model"), ("split-outliers", "--channels", "1")),
    "study": (("study",),),
    "train": (("train",),),
    "plan": (("plan",),),
    "config": (("config", "show"),),
    "fetch": (("fetch",),),
    "submit": (("submit", "--address", "http://127.0.0.1:1"),),
}
PATHS = {"long": LONG, "deep": "x/" * 2500, "no text": "a\udc80b", "a loop": "loop", "unknown home": "~no_such_user/x"}


def places() -> list[Case]:
    """Paths that no file system takes, in every argument that is a path."""
    found = []
    for command, places_ in PLACES.items():
        for start in places_:
            for title, text in PATHS.items():
                rest = ("out",) if start == ("export",) or start[-1] == "1" else ()
                argv = (*start, text, *rest)
                edit = then(lambda folder: (folder / "loop").symlink_to("loop"))
                # It may be made, only be looked at, or give way to a page.
                free = title == "unknown home" or command == "doctor" or start[-1] == "--out"
                found.append(
                    Case("path", f"{' '.join(start)} {title}", edit=edit, argv=argv, exit_code=(1, 2), is_either=free,
                         may_write=free)
                )  # fmt: skip
    return found


EVAL = ("eval", RUN)
EVALS: list[tuple[Words, Words]] = [
    (("eval",), ("RUN",)),
    (("eval", "nothing"), ("no such config file",)),
    (("eval", "c.yaml", "--model", "nowhere"), ("nowhere",)),
    ((*EVAL, "--formats", "int3"), ("int3",)),
    ((*EVAL, "--formats", "mxfp8"), ("mxfp8",)),
    ((*EVAL, "--num-prompts", "0"), ("--num-prompts",)),
    ((*EVAL, "--num-samples", "x"), ("--num-samples",)),
    ((*EVAL, "--num-samples", "9" * 5000), ("--num-samples",)),
    ((*EVAL, "--top-k", "99999999999999"), ("--top-k",)),
    ((*EVAL, "--max-new-tokens", "64"), ("--max-new-tokens", "rollout.max_model_len")),
    ((*EVAL, "--max-new-tokens", "63"), ("rollout.max_model_len",)),
    ((*EVAL, "--temperature", "-1"), ("--temperature",)),
    ((*EVAL, "--temperature", "nan"), ("--temperature",)),
    ((*EVAL, "--top-p", "0"), ("--top-p",)),
    ((*EVAL, "--min-p", "2"), ("--min-p",)),
    ((*EVAL, "--seed", "x"), ("--seed",)),
    ((*EVAL, "--out", "train.jsonl"), ("train.jsonl",)),
    ((*EVAL, "--out", "model"), ("model", "--out")),
    ((*EVAL, "--out", "/proc/x"), ("/proc/x",)),
    ((*EVAL, "--model", "train.jsonl"), ("train.jsonl",)),
    ((*EVAL, "train.stepz=3"), ("train.stepz",)),
    ((*EVAL, "reward.kind=custom", "reward.function=gone.py:f"), ("gone.py",)),
    ((*EVAL, "reward.components=[{kind: http, settings: {url: 'http://127.0.0.1:1'}}]"), ("127.0.0.1:1",)),
    ((*EVAL, "reward.components=[{kind: judge, settings: {base_url: 'http://x', model: m, template: '{response}', api_key_env: NO_SUCH_KEY}}]"), ("NO_SUCH_KEY",)),
    ((*EVAL, "environment={kind: guess, settings: {guess: 3}}"), ("'guess'",)),
    ((*EVAL, "environment={kind: guess, python: gone}"), ("environment.python",)),
    ((*EVAL, "rollout.sampling.stop_token_ids=[64]"), ("rollout.sampling.stop_token_ids",)),
    ((*EVAL, "task.heldout_path=gone.jsonl"), ("gone.jsonl",)),
    ((*EVAL, "rollout.max_model_len=4096", "learner.max_tokens_per_micro_batch=4096"), ("rollout.max_model_len",)),
]  # fmt: skip
BROKEN_EVALS: list[tuple[str, Edit, Words]] = [
    ("no final model", lambda f: shutil.rmtree(f / RUN / "final"), ("no final model",)),
    ("final model without weights", lambda f: (f / RUN / "final/model.safetensors").unlink(), ("final",)),
    ("final model cut off", lambda f: (f / RUN / "final/model.safetensors").write_bytes(b"x" * 99), ("final",)),
    ("config broken", write(f"{RUN}/config.yaml", "a: ["), ("config.yaml",)),
    ("settings broken", lambda f: ((f / RUN / "eval").mkdir(), (f / RUN / "eval/settings.json").write_text("[")), ("settings.json",)),
    ("settings of another", lambda f: ((f / RUN / "eval").mkdir(), (f / RUN / "eval/settings.json").write_text("{}")), ("other settings",)),
    ("settings a folder", lambda f: (f / RUN / "eval/settings.json").mkdir(parents=True), ("settings.json",)),
    ("a file in its place", lambda f: (f / RUN / "eval").touch(), ("eval",)),
]  # fmt: skip

OTHERS: list[tuple[Words, Words]] = [
    (("runs", "nowhere"), ("nowhere", "run.dir")),
    (("runs", "c.yaml"), ("c.yaml",)),
    (("runs", "--jsn"), ("--jsn",)),
    (("dashboard",), ("RUN",)),
    (("dashboard", RUN), ("--entity",)),
    (("dashboard", "nowhere", "--entity", "me"), ("nowhere", "is no folder of a run")),
    (("dashboard", "model", "--entity", "me"), ("is no folder of a run",)),
    (("dashboard", RUN, "--entity", "me", "--json", "model"), ("model",)),
    (("dashboard", RUN, "--entity", "me", "--json", f"{RUN}/config.yaml/w.json"), ("is no folder; name another file",)),
    (("dashboard", RUN, "--entity", "me", "--json", "/proc/w.json"), ("/proc/w.json",)),
    (("report", RUN, "--out", "model"), ("model",)),
    (("report", RUN, "--out", "/proc/x/r.html"), ("/proc",)),
    (("report", RUN, "--out", "train.jsonl/r.html"), ("train.jsonl",)),
    (("report", RUN, "nowhere"), ("nowhere",)),
    (("doctor", "--dir"), ("--dir",)),
    (("doctor", "runs"), ("runs",)),
    (("mismatch", "model", "--lr", "nan"), ("--lr",)),
    (("mismatch", "model", "--lr", "-1"), ("--lr",)),
    (("mismatch", "model", "--num-sequences", "0"), ("--num-sequences",)),
    (("export", RUN, "out", "--format", "mxfp8"), ("mxfp8",)),
]  # fmt: skip
GOOD: list[Words] = [
    *LOOKS.values(),
    ("runs", "model"),
    EVAL,
    (*EVAL, "--formats", "none", "w8a8_int8", "--num-samples", "2", "--out", "new/deep"),
    ("eval", "c.yaml", "--out", "new"),
    ("eval", RUN, "environment={kind: guess}", "--num-prompts", "3"),
]


def cases(kind: str, listed: list[tuple[Words, Words]], may_write: bool = False) -> list[Case]:
    edit = then(functions)
    return [
        Case(kind, f"{' '.join(argv)!r:.80}", words, edit=edit, argv=argv, exit_code=(1, 2), may_write=may_write)
        for argv, words in listed
    ]


CASES = [
    *cases("eval", EVALS),
    *(Case("eval of a broken run", name, words, edit=then(edit), argv=EVAL) for name, edit, words in BROKEN_EVALS),
    *cases("readers", OTHERS, may_write=True),
    *(Case("good reader", " ".join(argv), edit=ended_run, argv=argv, is_good=True) for argv in GOOD),
    *places(),
    *readers(),
]

"""Commands with wrong arguments, and on folders that are not what they need."""

from __future__ import annotations

from pathlib import Path

from tests.campaign.harness import Case

COMMANDS: list[tuple[tuple[str, ...], tuple[str, ...]]] = [
    ((), ("COMMAND",)),
    (("fly",), ("fly",)),
    (("train",), ("config",)),
    (("train", "nothing"), ("no such config file",)),
    (("train", "c.yaml", "--dryrun"), ("--dryrun",)),
    (("train", "c.yaml", "--dry-run=3"), ("--dry-run",)),
    (("train", "c.yaml", "--dry-run", "model.path=nowhere"), ("nowhere",)),
    (("train", "c.yaml", "--dry-run", "train.stepz=3"), ("train.stepz",)),
    (("train", "model"), ("model", "no such config file")),
    (("train", "train.jsonl"), ("train.jsonl",)),
    (("plan", "c.yaml", "--device", "h9000"), ("h9000", "h100")),
    (("plan", "c.yaml", "--device", "cpu", "--response-tokens", "17"), ("--response-tokens", "16")),
    (("plan", "c.yaml", "--device", "cpu", "--prompt-tokens", "49"), ("--prompt-tokens", "48")),
    (("plan", "c.yaml", "--response-tokens", "0"), ("--response-tokens",)),
    (("plan", "c.yaml", "--response-tokens", "x"), ("--response-tokens",)),
    (("plan", "c.yaml", "--json", "model.path=nowhere"), ("nowhere",)),
    (("plan", "c.yaml", "--json", "seed"), ("seed",)),
    (("plan", "nothing"), ("no such config file",)),
    (("report", "nowhere"), ("nowhere",)),
    (("report", "model"), ("model",)),
    (("report", "c.yaml"), ("c.yaml",)),
    (("report",), ("RUN",)),
    (("export", "nowhere", "out"), ("nowhere", "no folder of a run")),
    (("export", "model", "out"), ("model", "no folder of a run")),
    (("export", "model", "train.jsonl"), ("train.jsonl", "exists")),
    (("export", "model", "out", "--format", "int3"), ("int3",)),
    (("split-outliers", "nowhere", "out", "--channels", "1"), ("nowhere",)),
    (("split-outliers", "model", "train.jsonl", "--channels", "1"), ("train.jsonl", "exists")),
    (("split-outliers", "model", "out", "--channels", "0"), ("--channels",)),
    (("split-outliers", "model", "out", "--channels", "-3"), ("--channels",)),
    (("split-outliers", "model", "out", "--channels", "100000"), ("100000",)),
    (("split-outliers", "model", "out"), ("--channels",)),
    (("study", "nothing"), ("no such config file",)),
    (("study", "c.yaml"), ("c.yaml", "arms")),
    (("study", "tbpo", "--arms", "nothing"), ("nothing",)),
    (("study", "tbpo", "--seeds", "x"), ("x",)),
    (("mismatch", "nowhere"), ("nowhere",)),
    (("mismatch", "model", "--lengths", "5000"), ("--lengths",)),
    (("mismatch", "model", "--scheme", "int3"), ("int3",)),
    (("mismatch", "model", "--prompts", "nowhere.txt"), ("nowhere.txt",)),
    (("mismatch", "model", "--stale-model", "nowhere"), ("nowhere",)),
    (("mismatch", "model", "--out", "train.jsonl"), ("train.jsonl",)),
    (("config", "show", "nothing"), ("no such config file",)),
    (("config", "show", "c.yaml", "seed=x"), ("seed",)),
    (("config",), ("WHAT",)),
    (("fetch", "c.yaml"), ("model.fetch",)),
    (("submit", "c.yaml"), ("--address",)),
    (("submit", "c.yaml", "--address", "nonsense"), ("nonsense",)),
    (("submit", "c.yaml", "train.stepz=3", "--address", "http://127.0.0.1:1"), ("train.stepz",)),
    (("bench", "nothing"), ("nothing",)),
    (("bench", "pool", "--sizes", "0"), ("--sizes",)),
    (("bench", "publish", "--hidden", "100"), ("--hidden",)),
]

GOOD: list[tuple[str, ...]] = [
    ("split-outliers", "model", "new/deep/out", "--channels", "1"),
    ("config", "list"),
    ("config", "keys"),
    ("config", "show", "c.yaml"),
    ("plan", "c.yaml", "--device", "cpu", "--json", "train.steps=3"),
    ("plan", "c.yaml", "--response-tokens", "16", "--device", "cpu"),
    ("train", "c.yaml", "--dry-run", "train.steps=3"),
    ("train", "--dry-run", "c.yaml", "train.steps=3"),
]


def without_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / "model" / name).unlink()


CASES = [
    *(Case("command", " ".join(argv), words, argv=argv, exit_code=(1, 2)) for argv, words in COMMANDS),
    *(Case("good command", " ".join(argv), argv=argv, is_good=True) for argv in GOOD),
    Case(
        "command",
        "split-outliers without tokenizer",
        ("tokenizer",),
        edit=without_tokenizer,
        argv=("split-outliers", "model", "out", "--channels", "1"),
    ),
]

"""Broken run folders and checkpoints: every file of a killed run damaged in every way, and places where none can be."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from tests.campaign.harness import CONFIG, Case
from tests.campaign.model_cases import damages

Edit = Callable[[Path], object]
NEWEST, BEFORE = "runs/r/checkpoints/step_000004", "runs/r/checkpoints/step_000002"
AGAIN = ("run.resume=false",)


def killed_run(folder: Path) -> None:
    """A run that was killed after step 5, with checkpoints of steps 2 and 4."""
    from launch.run.folder import RunFolder
    from launch.run.prompts import load_prompts
    from launch.run.resume import input_digests
    from qarl.config.io import load_config

    train = CONFIG["train"] | {"steps": 6, "checkpoint_every": 2}
    (folder / "c.yaml").write_text(json.dumps(CONFIG | {"train": train}))
    config = load_config(folder / "c.yaml")
    _, prompts, heldout = load_prompts(config, lambda _: None)
    run = RunFolder(config, lambda _: None)
    with run.begin(input_digests(config, prompts, heldout)):
        rows = [{"step": step, "reward/mean": 0.5} for step in range(6)]
        (run.path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for step in (2, 4):
            run.checkpoints.save(step, lambda part: Path(part, "weights").write_bytes(bytes(range(200))) and None, {})


def after(*edits: Edit) -> Edit:
    return lambda folder: [edit(folder) for edit in (killed_run, *edits)]


def state(**changes: object) -> Edit:
    """The newest checkpoint's state with other values, and a manifest that says so."""

    def edit(folder: Path) -> None:
        from trainer.checkpoint import _digests

        file = folder / NEWEST / "state.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
        (folder / NEWEST / "manifest.json").write_text(json.dumps(_digests(folder / NEWEST)))

    return edit


def removed(*names: str) -> Edit:
    def edit(folder: Path) -> None:
        for name in names:
            path = folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return edit


def touched(name: str) -> Edit:
    return lambda folder: ((folder / name).parent.mkdir(parents=True, exist_ok=True), (folder / name).touch())


RUNS: list[tuple[str, Edit, tuple[str, ...], tuple[str, ...]]] = [
    ("other seed", after(), ("seed=1",), ("seed",)),
    ("other data", after(), ("train.group_size=3",), ("train.group_size",)),
    ("no checkpoints", after(removed("runs/r/checkpoints")), (), ("no checkpoint", *AGAIN)),
    ("no config", after(removed("runs/r/config.yaml")), (), ("config.yaml",)),
    ("no metrics", after(removed("runs/r/metrics.jsonl")), (), ("metrics.jsonl", *AGAIN)),
    ("no inputs", after(removed("runs/r/inputs.json")), (), ("inputs.json", *AGAIN)),
    ("a folder beside the checkpoints", after(lambda f: (f / "runs/r/checkpoints/step_old").mkdir()), (), ("step_old",)),
    ("not a run", lambda f: (f / "runs/r").mkdir(parents=True), AGAIN, ("no run's folder",)),
    ("a file in its place", touched("runs/r"), (), ("runs/r",)),
    ("below a file", touched("runs"), (), ("runs",)),
    ("a link to nothing", lambda f: ((f / "runs").mkdir(), (f / "runs/r").symlink_to("gone")), (), ("runs/r",)),
    ("a link to itself", lambda f: ((f / "runs").mkdir(), (f / "runs/r").symlink_to("r")), (), ("runs/r",)),
    ("in /proc", lambda f: None, ("run.dir=/proc",), ("/proc",)),
    ("in /dev/full", lambda f: None, ("run.dir=/dev/full",), ("/dev/full",)),
    ("in the data file", lambda f: None, ("run.dir=train.jsonl",), ("train.jsonl",)),
    ("in the model", lambda f: None, ("run.dir=.", "run.name=model", "run.resume=false"), ("model",)),
]  # fmt: skip

BACK: list[tuple[str, Edit, tuple[str, ...]]] = [
    ("one byte of the weights", after(lambda f: (f / NEWEST / "learner/weights").write_bytes(bytes(200))), ("step 2",)),
    ("weights missing", after(removed(f"{NEWEST}/learner/weights")), ("step 2",)),
    ("an extra file", after(touched(f"{NEWEST}/learner/more")), ("step 2",)),
    ("state of another step", after(state(step=3)), ("step 2",)),
    ("state of another version", after(state(schema=99)), ("step 2",)),
    ("a step that is text", after(state(step="4")), ("step 2",)),
    ("left half written", after(lambda f: shutil.copytree(f / NEWEST, f / "runs/r/checkpoints/step_000006.part")), ()),
    ("the good run", after(), ()),
]  # fmt: skip
LAST = after(removed(BEFORE))

CASES = [
    *(Case("run folder", name, words, settings, edit) for name, edit, settings, words in RUNS),
    *(Case("goes back, or on", name, words, edit=edit, is_good=True) for name, edit, words in BACK),
    *(
        Case("run file", f"{name}: {title}", (), edit=after(edit), is_either=True)
        for name in ("config.yaml", "metrics.jsonl", "inputs.json")
        for title, edit in damages(f"runs/r/{name}")
    ),
    *(
        Case("newest checkpoint", f"{name}: {title}", ("step 2",), edit=after(edit), is_good=True)
        for name in ("state.json", "manifest.json", "learner/weights")
        for title, edit in damages(f"{NEWEST}/{name}")
    ),
    *(
        Case("only checkpoint", f"{name}: {title}", ("step_000004",), edit=after(removed(BEFORE), edit), exit_code=(1, 2))
        for name in ("state.json", "manifest.json", "learner/weights")
        for title, edit in damages(f"{NEWEST}/{name}")
    ),
]  # fmt: skip

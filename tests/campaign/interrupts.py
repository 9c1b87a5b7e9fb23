"""Interrupts of a real run, by name: `python -m tests.campaign.interrupts [CHAIN | KIND:PHASE,... ...]`.

A chain is one small run that is started again and again. In each start the next phase is awaited, and there the next
kind of interrupt is made. Checked are then: exit code and line; no process is left after ten seconds; and after the
last start, that weights, metrics, samples and names of files are those of a run that nobody has disturbed, no row
missing or twice. Chain n has every phase once, its kinds begin with the n-th: all chains together have every kind in
every phase. With `--folder` and `--minutes` they can be run in pieces.
"""

from __future__ import annotations

import argparse
import json
import math
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory, gettempdir
from typing import NamedTuple

from launch.tools.chaos.checks import differences
from launch.tools.chaos.faults import RANK, WORKER, Injection, send
from launch.tools.chaos.start import Start
from qarl.errors import AGAIN

ROOT = Path(__file__).parents[2]
CONFIG = """
inherits: {root}/configs/quickstart.yaml
run: {{name: tried}}
model: {{path: {model}, build: null}}
task: {{num_prompts: 16, levels: [2, 3]}}
reward: {{kind: custom, function: "mine.py:judge"}}
rollout: {{num_workers: 1, num_cpus_per_worker: 0.5, max_restarts: 99}}
learner: {{num_ranks: 1, num_cpus_per_rank: 0.5, minibatches: 2, optimizer: {{lr: 0.01, warmup_steps: 0}}}}
train: {{steps: 6, prompts_per_step: 4, group_size: 4, checkpoint_every: 1}}
eval: {{every: 1, num_prompts: 4, num_samples: 1, final_num_prompts: 4, greedy: false}}
mismatch: {{proof_every: 1, unaligned_every: 0}}
tracking: {{trackers: [jsonl], table_every: 1}}
"""
JUDGE = "def judge(text, finish_reason, answer):\n    return len(set(text)) % 3 / 2\n"


COMMAND = [sys.executable, "-c", "import sys; from launch.cli import main; sys.exit(main())", "train", "mine.yaml"]


def begin(folder: Path) -> Start:
    """Start or continue the run in `folder`."""
    kept = gettempdir()  # Ray's sockets need a short path, and what inductor compiles takes long
    env = {"PYTHONPATH": str(ROOT), "TMPDIR": str(folder / "tmp"), "RAY_TMPDIR": kept}
    env |= {"TORCHINDUCTOR_CACHE_DIR": str(Path(kept) / "torchinductor")}
    env |= {"RAY_worker_niceness": "0"}  # beside other work, actors would wait for a processor for minutes
    return Start(folder / "runs" / "tried", COMMAND, folder, env, cwd=folder)


def _samples_after_a_step(log: str) -> bool:
    """Whether a worker has got the weights of a step, and samples from them."""
    before, _, after = log.rpartition("loads weights version")
    return "loads weights version" in before and " samples " in after


PHASES: dict[str, Callable[[Start], bool]] = {
    "imports": lambda p: p.maps("pydantic_core"),
    "checks": lambda p: (p.run.parent / ".tried.lock").exists() and p.maps("libtorch"),
    "Ray": lambda p: p.wrote("config.yaml"),
    "engine": lambda p: "process" in p.new("logs/worker-0.log"),
    "learner": lambda p: "process" in p.new("logs/rank-0.log"),
    "publication": lambda p: "loads weights version" in p.new("logs/worker-0.log"),
    "sampling": lambda p: _samples_after_a_step(p.new("logs/worker-0.log")),
    "update": lambda p: p.new("logs/rank-0.log").count("learns from") > 1,
    "evaluation": lambda p: p.new("metrics.jsonl").count("reward/mean") > 1,
    "checkpoint": lambda p: bool(p.checkpoints()) and p.is_saving(),
    "end": lambda p: (p.run / "final").exists(),
}
"""Whether a start is in that phase; from sampling on in its second step, so that the next start has a checkpoint."""


class Kind(NamedTuple):
    """One way to disturb a run. `code` is promised, and `line` on stderr; with code 0 the run goes on, and `line` is on
    stdout."""

    inject: Injection
    code: int
    line: str = ""


GOES_ON = Kind(send(signal.SIGKILL), 0)
INTERRUPTED = f"qarl: interrupted; {AGAIN}"
KINDS = {
    "SIGINT": Kind(send(signal.SIGINT, group=True), 130, INTERRUPTED),
    "SIGTERM": Kind(send(signal.SIGTERM), 130, INTERRUPTED),
    "SIGHUP": Kind(send(signal.SIGHUP, group=True), 130, INTERRUPTED),
    "driver": Kind(send(signal.SIGKILL), -signal.SIGKILL),
    "rank": Kind(send(signal.SIGKILL, RANK), 1, "a learner rank died"),
    "worker": Kind(send(signal.SIGKILL, WORKER), 0, "replacing it"),
    "verifier": Kind(send(signal.SIGKILL, "rewards.child"), 0),
}


Cell = tuple[str, str]
"""A kind and a phase."""
UNNEEDED = [("rank", "end"), ("worker", "end")]
"""Nobody may need that process any more: then its death changes nothing."""


def chain(number: int) -> list[Cell]:
    """Every phase, each with another kind, so that all chains together are all cells."""
    kinds = list(KINDS)
    return [(kinds[(number + i) % len(kinds)], phase) for i, phase in enumerate(PHASES)]


@dataclass
class Campaign:
    """What is tried, in `folder`, and what came of it, in its file `results.jsonl`; a further call goes on from there.

    Attributes:
        seconds: after so many no further start begins.
    """

    folder: Path
    seconds: float = math.inf
    results: list[dict[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.folder.mkdir(exist_ok=True)
        self._began, self._file = time.monotonic(), self.folder / "results.jsonl"
        if self._file.exists():
            self.results = [json.loads(line) for line in self._file.read_text().splitlines()]

    def note(self, name: str, kind: str, phase: str, faults: Sequence[str]) -> None:
        """Keep what came of a cell of the chain `name`."""
        result = {"chain": name, "kind": kind, "phase": phase, "result": "; ".join(faults) or "right"}
        print(*result.values(), flush=True)
        self.results.append(result)
        with self._file.open("a") as file:
            file.write(json.dumps(result) + "\n")

    def has_time(self) -> bool:
        return time.monotonic() - self._began < self.seconds

    def run(self, name: str, cells: Sequence[Cell]) -> None:
        """The undisturbed run, then each of `cells` in its turn, in as many starts as that takes; then the run must end
        like the other."""
        reference, folder, end = self.folder / "undisturbed", self.folder / name, ("", "end of the chain")
        if not reference.exists():
            self.note("undisturbed", "", "a run that nobody disturbs", self.undisturbed(reference))
        done = [(result["kind"], result["phase"]) for result in self.results if result["chain"] == name]
        waiting = [cell for cell in cells if cell not in done]
        if not folder.exists():
            prepare(folder, self.folder / "model")
        while end not in done and self.has_time():
            start, tried = begin(folder), list[Cell]()
            while waiting and not (tried and KINDS[tried[-1][0]].code) and wait(start, waiting[0][1]):
                cell = waiting.pop(0)
                if KINDS[cell[0]].inject(start, Random(0)):
                    tried.append(cell)
                else:
                    self.note(name, *cell, [ABSENT])
            last = KINDS[tried[-1][0]] if tried else GOES_ON
            if tried and tried[-1] in UNNEEDED and start.end() == 0:
                last = GOES_ON
            faults = check_end(start, last)
            for cell in tried:
                line = KINDS[cell[0]].line if not KINDS[cell[0]].code and cell not in UNNEEDED else ""
                own = faults if cell == tried[-1] else []
                self.note(name, *cell, own + [f"stdout lacks '{line}'"] * (line not in start.stdout()))
            if not last.code:
                if not (folder / "runs" / "tried" / "summary.json").exists():
                    return self.note(name, *end, [*faults, "the run does not end"])
                faults = ([] if tried else faults) + [f"{cell} did not come" for cell in waiting]
                ours, other = (path / "runs" / "tried" for path in (folder, reference))
                return self.note(name, *end, faults + differences(ours, other))

    def undisturbed(self, folder: Path) -> list[str]:
        """The run to compare with; meanwhile a second one of its name is refused."""
        prepare(folder, make_model(self.folder / "model"))
        first = begin(folder)
        wait(first, "Ray")  # long before its end
        faults = begin(folder).faults_of_end([2], "is at work on this run")
        faults += check_end(first, GOES_ON)
        left = [path for path in (folder / "tmp").iterdir() if not path.name.startswith("torchinductor")]  # a cache
        return faults + [f"left are {left}"] * bool(left)

    def grid(self) -> str:
        """A row for each kind, a column for each phase."""
        lines = [f"{'':9s}" + "".join(f"{phase:>12s}" for phase in PHASES)]
        found = {(result["kind"], result["phase"]): result["result"] for result in self.results}
        for kind in KINDS:
            cells = [found.get((kind, phase), "not run") for phase in PHASES]
            shown = [cell if cell in ("right", ABSENT, "not run") else "FAULT" for cell in cells]
            lines.append(f"{kind:9s}" + "".join(f"{cell:>12s}" for cell in shown))
        return "\n".join(lines)


ABSENT = "absent"
"""The process does not exist in that phase."""


def wait(start: Start, phase: str) -> bool:
    """Whether `phase` came before the run ended."""
    return start.reaches(partial(PHASES[phase], start))


def check_end(start: Start, kind: Kind) -> list[str]:
    """What is wrong with the end of a start that was interrupted as `kind` says, or was not."""
    faults, lines = start.faults_of_end([kind.code], kind.line), start.stderr()
    return [*faults, f"prints: {lines[-5:]}"] if lines and not kind.code else faults


def prepare(folder: Path, model: Path) -> Path:
    (folder / "tmp").mkdir(parents=True)
    (folder / "mine.yaml").write_text(CONFIG.format(root=ROOT, model=model))
    (folder / "mine.py").write_text(JUDGE)
    return folder


def make_model(folder: Path) -> Path:
    """A random model of 0.2M parameters."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from launch.demo.tiny_model import make_tokenizer

    torch.manual_seed(0)
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 4}
    more = {"num_key_value_heads": 2, "head_dim": 32, "vocab_size": 256, "max_position_embeddings": 256}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.06}
    config = AutoConfig.for_model("qwen3", **shape, **more, **ids, tie_word_embeddings=True)
    AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(folder)
    make_tokenizer(256).save_pretrained(folder)
    return folder


def cells_of(word: str) -> list[Cell]:
    """The cells that a word of the command line names."""
    if word.isdigit() and int(word) < len(KINDS):
        return chain(int(word))
    cells = [(kind, phase) for kind, _, phase in (cell.partition(":") for cell in word.split(","))]
    if all(kind in KINDS and phase in PHASES for kind, phase in cells):
        return cells
    raise SystemExit(f"{word} is neither a chain (0 to {len(KINDS) - 1}) nor KIND:PHASE,...")


def main() -> int:
    parser = argparse.ArgumentParser(description=f"kinds: {', '.join(KINDS)}; phases: {', '.join(PHASES)}")
    every = [str(number) for number in range(len(KINDS))]
    parser.add_argument("chains", nargs="*", default=every, metavar="CHAIN | KIND:PHASE,...")
    parser.add_argument("--folder", type=Path, help="keeps everything, so that a further call goes on")
    parser.add_argument("--minutes", type=float, default=math.inf, help="after these no further start begins")
    args = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell in the background lets its processes ignore it
    with TemporaryDirectory(prefix="q") as folder:
        campaign = Campaign(args.folder or Path(folder), args.minutes * 60)
        for name in args.chains:
            if campaign.has_time():
                campaign.run(name.replace(",", "_").replace(":", "-"), cells_of(name))
    print(campaign.grid())
    return any(result["result"] not in ("right", ABSENT) for result in campaign.results)


if __name__ == "__main__":
    sys.exit(main())

"""`qarl bench e2e`: whole steps of qarl and of TRL's GRPOTrainer on the same work, in turn, on this machine.

Both get the model, the dtype, the prompts, and the numbers of rollouts, tokens and minibatches of a qarl config. No
response ends before `max_new_tokens`: qarl goes on after an end token, and TRL samples none. qarl runs as configured,
with its diagnostics, but learns from all rollouts and multiplies in full precision, as TRL does (`SAME_WORK`); TRL as
documented, in an environment of its own, without gradient checkpointing, which would slow it. The first step of each
run warms it up and does not count; in qarl's it also proves that learner and sampler agree, as in `steps.py`.
"""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import mean, median

import psutil
from transformers import AutoTokenizer

from launch.run.prompts import load_prompts
from launch.run.tracking import METRICS_FILE
from launch.tools.child import child
from qarl.config.io import load_config
from qarl.config.run import Config
from qarl.config.shipped import config_path
from qarl.errors import QarlError, how_ended

TRL = "1.16.0"
FOLDER = Path("runs", "bench")
MARK = "qarl-bench "
SAME_WORK = (
    "advantage.drop_zero_variance=false",
    "learner.gradient_precision=highest",
    "mismatch.proof_steps=1",
    "rollout.sampling.ignore_eos=true",
    "rollout.sampling.stop=[]",
    "rollout.sampling.stop_token_ids=[]",
)
HEADER = (
    "| work | | step, s | sampling, s | rest, s | tokens a step | memory, GiB |\n|---|---|---:|---:|---:|---:|---:|"
)


@dataclass(frozen=True)
class Steps:
    """What one run measured: seconds and sampled tokens of each step but the first, and the largest memory in bytes."""

    step: Sequence[float]
    sample: Sequence[float]
    tokens: Sequence[int]
    memory: int


def bench(configs: Sequence[str], overrides: Sequence[str], steps: int, rounds: int) -> Iterator[str]:
    """Table rows, after each pair of runs.

    Raises:
        ConfigError, ModelError, DataError: as `qarl train`.
        QarlError: TRL cannot be installed, a run failed (its log is named), or the two did not sample as many tokens.
    """
    python = trl_environment()
    yield f"{steps} steps a run of responses of full length, one warm-up step more"
    yield f"TRL {TRL} with torch {version('torch')}\n\n{HEADER}"
    for name in configs:
        ratios = []
        for number in range(1, rounds + 1):
            ours = qarl_steps(name, overrides, steps, number)
            theirs = trl_steps(python, name, overrides, steps, number)
            ratios.append(median(theirs.step) / median(ours.step))
            yield row(name, "qarl", ours, theirs)
            yield row(name, "TRL", theirs, theirs)
            if list(ours.tokens) != list(theirs.tokens):
                what = f"{name}: qarl sampled {ours.tokens} tokens in its steps, TRL {theirs.tokens}"
                raise QarlError(what, hint=f"their logs lie in {FOLDER}")
        yield f"{name}: {median(ratios):.2f} times TRL's speed ({min(ratios):.2f} to {max(ratios):.2f})"


def row(work: str, what: str, steps: Steps, trl: Steps) -> str:
    """A table row; in brackets TRL's figure by this one."""
    cells = [f"{ours:.2f} ({theirs / ours:.2f})" for ours, theirs in zip(_figures(steps), _figures(trl), strict=True)]
    cells.insert(3, f"{mean(steps.tokens):.0f}")
    return f"| {work} | {what} | {' | '.join(cells)} |"


def _figures(steps: Steps) -> list[float]:
    """Seconds of a step, of its sampling and of the rest, and GiB."""
    rest = [step - sample for step, sample in zip(steps.step, steps.sample, strict=True)]
    return [median(steps.step), median(steps.sample), median(rest), steps.memory / 2**30]


def qarl_steps(name: str, overrides: Sequence[str], steps: int, number: int) -> Steps:
    """A run of `qarl train` without evaluations and checkpoints."""
    rows, memory = qarl_run(name, [*overrides, *SAME_WORK], steps, FOLDER / f"{Path(name).stem}-qarl-{number}.log")
    train = load_config(config_path(name), overrides).train
    tokens = [round(row["response_length/mean"] * train.prompts_per_step * train.group_size) for row in rows]
    return Steps([row["timing_s/step"] for row in rows], [row["timing_s/sample"] for row in rows], tokens, memory)


def qarl_run(name: str, overrides: Sequence[str], steps: int, log: Path) -> tuple[list[dict[str, float]], int]:
    """The metrics of a run's steps but the first, and the largest memory of its processes in bytes."""
    own = {
        "run.name": "bench-e2e",
        "run.resume": "false",
        "train.steps": steps + 1,
        "train.checkpoint_every": steps + 1,
        "eval.every": steps + 1,
        "eval.num_prompts": 4,
        "eval.final_num_prompts": 4,
        "eval.num_samples": 1,
        "eval.greedy": "false",
    }
    settings = [*overrides, *(f"{key}={value}" for key, value in own.items())]
    memory = run([sys.executable, "-m", "launch.cli", "train", name, *settings], log)
    lines = (load_config(config_path(name), settings).run.folder / METRICS_FILE).read_text().splitlines()
    return [row for row in map(json.loads, lines) if "timing_s/step" in row][1:], memory


def trl_steps(python: Path, name: str, overrides: Sequence[str], steps: int, number: int) -> Steps:
    """A run of `trl_grpo.py` on the same work. The model exists: a run of qarl has made it."""
    config = load_config(config_path(name), overrides)
    sampling = config.rollout.sampling
    work = {
        "model": config.model.path,
        "dtype": config.model.dtype,
        "rollouts": config.train.prompts_per_step * config.train.group_size,
        "group_size": config.train.group_size,
        "minibatches": config.learner.minibatches,
        "max_new_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "lr": config.learner.optimizer.lr,
        "steps": steps + 1,
        "seed": config.seed,
        "answer_pattern": getattr(config.task, "answer_pattern", r"(?s)^.*$"),
        "output": str(FOLDER / "trl-output"),
        "prompts": prompts_of(config),
    }
    file, log = FOLDER / "trl-work.json", FOLDER / f"{Path(name).stem}-trl-{number}.log"
    file.write_text(json.dumps(work))
    memory = run([str(python), "-P", str(Path(__file__).with_name("trl_grpo.py")), str(file)], log)
    rows = [json.loads(line.removeprefix(MARK)) for line in log.read_text().splitlines() if line.startswith(MARK)][1:]
    step, sample, tokens = ([row[key] for row in rows] for key in ("step", "sample", "tokens"))
    return Steps(step, sample, tokens, memory)


def prompts_of(config: Config) -> list[dict[str, object]]:
    """The training prompts as text that the tokenizer reads as their tokens, which `trl_grpo.py` checks."""
    tokenizer = AutoTokenizer.from_pretrained(config.model.path, local_files_only=True)
    _, prompts, _ = load_prompts(config, lambda line: None)
    rows: list[dict[str, object]] = []
    for prompt in prompts:
        ids = list(prompt.token_ids)
        text = prompt.text if tokenizer.encode(prompt.text) == ids else tokenizer.decode(ids)
        rows.append({"prompt": text, "answer": prompt.answer, "ids": ids})
    return rows


def run(command: Sequence[str], log: Path) -> int:
    """Run a command to its end, its output in `log`; returns the largest memory of all its processes, in bytes.

    Memory that processes share counts once.
    """
    largest = 0
    with child(command, log) as process:
        while process.poll() is None:
            largest = max(largest, memory_of(process))
            time.sleep(1)
    if process.returncode:
        last = (log.read_text().strip().splitlines() or ["no output"])[-1]
        raise QarlError(f"{how_ended(process.returncode)}: {last}", str(log))
    return largest


def memory_of(process: psutil.Process) -> int:
    total = 0
    try:
        for member in [process, *process.children(recursive=True)]:
            total += member.memory_full_info().pss
    except psutil.NoSuchProcess:
        pass  # a process has ended meanwhile: the next look counts the others
    return total


def trl_environment() -> Path:
    """The Python of TRL's own environment, which is made when it does not exist. Raises QarlError."""
    folder = FOLDER / f"trl-{TRL}"
    python, stamp = folder / "bin" / "python", folder / "complete"
    if not stamp.exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        same = (f"{name}=={version(name).partition('+')[0]}" for name in ("torch", "transformers", "accelerate"))
        run([sys.executable, "-m", "venv", "--clear", str(folder)], FOLDER / "trl-install.log")
        run([str(python), "-m", "pip", "install", f"trl=={TRL}", *same], FOLDER / "trl-install.log")
        stamp.touch()
    return python

"""`qarl eval`: held-out accuracy of a run's model or of any other, in several schemes side by side.

With default settings it samples what the run's last evaluation samples, token by token.
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from launch.machine import Machine
from launch.preflight import check, checked_model, engine_faults, judge_faults, stop_faults
from launch.run.environments import Rewards, converse, start_rewards
from launch.run.files import write_whole
from launch.run.prompts import load_prompts
from launch.run.resume import input_digests
from launch.tools.child import own_process
from launch.tools.evaluation.report import Reader, results
from launch.tools.evaluation.settings import Sampling
from qarl.config.policy import RolloutConfig
from qarl.config.run import Config
from qarl.errors import ConfigError, DataError, RolloutError, first_line
from qarl.numerics.engine_limits import check_engine_model
from qarl.quant.publish import publish, write_engine_config
from qarl.quant.scheme import QuantScheme
from qarl.seeds import derive_seed
from qarl.types import Prompt, Sample, SampleRequest, Score
from qarl.weights.source import WeightSource
from rewards.kinds import answer_reader
from rollout.engine import VLLMEngine, engine_env
from trainer.policy import Policy

SAMPLES_FILE, RESULTS_FILE, SETTINGS_FILE = "samples.jsonl", "results.json", "settings.json"
CHUNK = 64
"""Prompts whose samples are judged and written together: what a killed evaluation may lose."""
Row = dict[str, Any]
COLUMNS: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("scheme", "prompt", "set", "finish_reason", "response"), str),
    **dict.fromkeys(("level", "reward", "success", "tokens"), (int, float)),
}
"""What the figures are made of."""


def evaluate(
    config: Config, schemes: Sequence[QuantScheme], sampling: Sampling, num_prompts: int, out: Path
) -> dict[str, Any]:
    """Sample and judge what `out` lacks; returns what is in `out/results.json` then.

    Args:
        config: as `config_for` makes it of the same `sampling` and `num_prompts`.

    Raises:
        ConfigError: `out` holds an evaluation with other settings, or a scheme cannot run here.
        ModelError, DataError, KernelError: model, data or scheme cannot be used.
        RolloutError: an engine died.
    """
    transformers_logging.disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    os.environ["DS_ACCELERATOR"] = device
    meta, machine = checked_model(config), Machine(device, is_here=True)
    check_engine_model(meta.config, config.rollout.max_model_len, device)
    check(judge_faults(config) + stop_faults(config, meta.config.vocab_size))
    for scheme in schemes:
        check(engine_faults(config, scheme, meta, machine))
    _, _, heldout = load_prompts(config, print)
    prompts = heldout[:num_prompts]
    with closing(start_rewards(config, print, None)) as rewards:
        rewards.check(prompts)
        _open(out, _settings(config, sampling, prompts))
        rows = _read(out, sampling.num_samples)
        for scheme in schemes:
            done = {row["prompt"] for row in rows if row["scheme"] == scheme.label}
            missing = [prompt for prompt in prompts if prompt.id not in done]
            print(f"{scheme.label}: {len(missing)} of {len(prompts)} prompts to sample", flush=True)
            if missing:
                rows += _sample(config, scheme, device, missing, sampling, rewards, out)
    found = results(rows, [scheme.label for scheme in schemes], sampling.num_samples, _reader(config))
    found = {"settings": asdict(sampling), "model": config.model.path, **found}
    write_whole(out / RESULTS_FILE, json.dumps(found, indent=2) + "\n")
    return found


def _reader(config: Config) -> Reader | None:
    """How the component of the success reads an answer; None where it reads none, or where several may be it."""
    parts = config.reward.parts()
    part = next((part for part in parts if part.label == config.reward.success), parts[0])
    return None if part.sources or config.environment.kind != "none" else answer_reader(part.kind, part.settings)


def _sample(
    config: Config,
    scheme: QuantScheme,
    device: str,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    rewards: Rewards,
    out: Path,
) -> list[Row]:
    """Rows of all samples of `prompts`, which are in the file of samples then, too."""
    rows: list[Row] = []
    with _engine(config, scheme, device) as engine, (out / SAMPLES_FILE).open("a", encoding="utf-8") as file:
        sampler = converse(config, engine, rewards)
        for start in range(0, len(prompts), CHUNK):
            chunk = prompts[start : start + CHUNK]
            samples = sampler.sample([request for prompt in chunk for request in _requests(config, prompt, sampling)])
            scores = rewards.score(samples)
            new = [
                _row(scheme, *pair, i % sampling.num_samples)
                for i, pair in enumerate(zip(samples, scores, strict=True))
            ]
            file.writelines(json.dumps(row) + "\n" for row in new)
            file.flush()
            rows += new
    return rows


def _requests(config: Config, prompt: Prompt, sampling: Sampling) -> Iterator[SampleRequest]:
    ask = config.rollout.sampling.request
    for index in range(sampling.num_samples):
        seed = derive_seed(sampling.seed, "eval", prompt.id, index)
        request = ask(prompt, seed, temperature=sampling.temperature)
        yield replace(request, top_p=sampling.top_p, top_k=sampling.top_k, min_p=sampling.min_p)


def _row(scheme: QuantScheme, sample: Sample, score: Score, index: int) -> Row:
    prompt = sample.prompt
    return {
        "scheme": scheme.label,
        "prompt": prompt.id,
        "set": prompt.heldout_set,
        "level": prompt.level,
        "index": index,
        "reward": score.reward,
        "success": score.solved,
        "error": score.error,
        "tokens": sample.num_sampled,
        "finish_reason": sample.finish_reason,
        "question": prompt.text,
        "answer": prompt.answer,
        "response": sample.text,
    }


class _Engine:
    """One engine in a process of its own, which holds no second one."""

    def __init__(self, call: Callable[..., Any], name: str) -> None:
        self._call, self._name = call, name

    def sample(self, requests: Sequence[SampleRequest]) -> list[Sample]:
        try:
            return list(self._call(_generate, list(requests)))
        except BrokenProcessPool as error:
            what = f"the engine of {self._name} died: {error}"
            raise RolloutError(what, hint="the same command continues") from error


_ENGINE: list[VLLMEngine] = []
"""Of the child process."""


def _start(
    path: Path, rollout: RolloutConfig, scheme: QuantScheme, dtype: str, device: str, weights: WeightSource
) -> None:
    engine = VLLMEngine(path, rollout, scheme, dtype, device)
    engine.load(weights)
    _ENGINE.append(engine)


def _generate(requests: list[SampleRequest]) -> list[Sample]:
    return _ENGINE[0].generate(requests)


@contextmanager
def _engine(config: Config, scheme: QuantScheme, device: str) -> Iterator[Any]:
    """An engine that holds the model in `scheme`, as a rollout worker does."""
    os.environ.update(engine_env(device, config.rollout))
    os.environ |= {"VLLM_LOGGING_LEVEL": "ERROR", "PYTHONWARNINGS": "ignore"}
    path, dtype = Path(config.model.path), config.model.dtype
    policy = Policy(path, getattr(torch, dtype), scheme, "stock", kernel="reference")
    weights = publish(policy.model, scheme, 0)
    del policy
    with TemporaryDirectory() as folder, own_process() as call:
        write_engine_config(Path(folder), path, scheme)
        try:
            call(_start, Path(folder), config.rollout, scheme, dtype, device, weights)
        except BrokenProcessPool as error:
            what = f"the engine of {scheme.label} died while it started: {error}"
            raise RolloutError(what, hint="a smaller rollout.kv_cache_gib takes less memory") from error
        yield _Engine(call, scheme.label)


def _settings(config: Config, sampling: Sampling, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """What all samples of one evaluation have in common."""
    model = Path(config.model.path)
    weights = {
        file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in sorted(model.glob("*.safetensors"))
    }
    rollout = config.rollout
    sections = {"reward": config.reward, "environment": config.environment, "sampling": rollout.sampling}
    return {
        "model": str(model),
        "dtype": config.model.dtype,
        "weights": weights,
        "inputs": input_digests(config, (), prompts),
        **{name: section.model_dump(mode="json") for name, section in sections.items()},
        "rollout": [rollout.max_model_len, rollout.ignore],
        **asdict(sampling),
    }


def _open(out: Path, settings: Mapping[str, Any]) -> None:
    """Begin the evaluation in `out`, or continue it. Raises ConfigError when it has other settings."""
    file = out / SETTINGS_FILE
    if not file.exists():
        if out.is_dir() and any(out.iterdir()):
            raise ConfigError(f"{out} holds something else", "--out", "name a new folder")
        try:
            out.mkdir(parents=True, exist_ok=True)
            write_whole(file, json.dumps(settings))
        except OSError as error:
            raise ConfigError(f"cannot be written: {error.strerror}", f"--out {out}", "name another folder") from error
        return
    try:
        before = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot be read: {first_line(error)}", str(file), "name a new folder with --out") from error
    if before != json.loads(json.dumps(settings)):
        raise ConfigError(f"{out} holds an evaluation with other settings", "--out", "name a new folder")


def _read(out: Path, num_samples: int) -> list[Row]:
    """The samples of prompts that have all of them; what a killed evaluation has begun besides leaves the file."""
    file = out / SAMPLES_FILE
    if not file.exists():
        return []
    try:
        text = file.read_text(encoding="utf-8")
        rows = [_checked(json.loads(line)) for line in text[: text.rfind("\n") + 1].splitlines()]
        counts = Counter((row["scheme"], row["prompt"]) for row in rows)
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"is no file of samples: {first_line(error)}", str(file), "remove the folder") from error
    whole = [row for row in rows if counts[row["scheme"], row["prompt"]] == num_samples]
    if len(whole) < len(rows) or not text.endswith("\n"):
        write_whole(file, "".join(json.dumps(row) + "\n" for row in whole))
    return whole


def _checked(row: Any) -> Row:
    """Raises ValueError: a line of the file of samples is not as `_row` makes it."""
    for name, kind in COLUMNS.items():
        if not isinstance(row, dict) or not isinstance(row.get(name), kind):
            raise ValueError(f"a line has no {name}")
    return dict(row)

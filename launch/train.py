"""The main job: config in, trained model and report out. Everything is wired here."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import ray
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from launch.cluster.placement import Placement, check_resources, connect, device_of
from launch.demo.controls import run_controls
from launch.demo.tiny_model import ensure_model
from launch.run.augment import make_augmenter
from launch.run.report import SUMMARY_FILE, Summary, read_summary, render_summary, write_report
from launch.run.resume import check_same_run
from launch.run.tracking import METRICS_FILE, RunTracker, read_log
from qarl.config.derived import numerics_of
from qarl.config.io import to_yaml
from qarl.config.run import Config
from qarl.config.schedule import scheme_at, schemes_of
from qarl.errors import ConfigError, DataError
from qarl.prompts.pool import make_pool
from qarl.quant.experts import check_engine
from qarl.quant.linear import covered_linears
from qarl.quant.publish import unquantized_config, write_engine_config
from qarl.quant.scheme import QuantScheme
from qarl.seeds import derive_seed
from qarl.tasks import make_task
from qarl.tasks.task import Task, encoder
from qarl.types import Prompt, WorkerInfo
from rewards.service import ProcessRewardService
from trainer.checkpoint import CheckpointStore
from trainer.loop import Trainer
from trainer.ranks import LearnerGroup


def train(config: Config, note: Callable[[str], None] = print) -> None:
    """Run, or continue, the run that `config` names. Prints the summary at the end.

    Raises:
        QarlError: with the reason; UsageError before anything has been started.
    """
    transformers_logging.disable_progress_bar()
    run_dir = Path(config.run.dir) / config.run.name
    checkpoints = CheckpointStore(run_dir / "checkpoints", config.train.keep_checkpoints)
    saved = None
    if config.run.resume and (saved := checkpoints.latest()):
        check_same_run(config, run_dir)
    if saved and saved[1]["step"] >= config.train.steps and (run_dir / SUMMARY_FILE).exists():
        note(f"{run_dir} is complete; `run.resume=false` starts it over")
        _print(read_summary(run_dir))
        return
    if config.cluster.address is None:
        there = {"CPU": float(os.cpu_count() or 1), "GPU": float(torch.cuda.device_count())}
        local_device = ("cuda" if there["GPU"] else "cpu") if config.cluster.device == "auto" else config.cluster.device
        check_resources(config, local_device, there)
    else:
        local_device = None
        connect(config)
        check_resources(config, device_of(config), ray.cluster_resources())
    ensure_model(config.model, config.task, config.seed, note)
    _check_scheme(config, local_device)
    tokenizer = AutoTokenizer.from_pretrained(config.model.path, local_files_only=True)
    task = make_task(config.task, encoder(tokenizer, config.task.chat))
    prompts, heldout = _load_prompts(config, task, note)
    aside = None if config.run.resume else _set_aside(run_dir)
    if aside is not None:
        note(f"starting over; the old run lies in {aside} until this one has ended well")
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "config.yaml").write_text(to_yaml(config))
    tracker = RunTracker(config, run_dir, saved[1]["step"] if saved else 0, config.train.steps)
    try:
        if config.cluster.address is None:
            connect(config)
        _Job(config, run_dir, checkpoints, tracker).run(task, prompts, heldout, saved)
    finally:
        tracker.close()
        ray.shutdown()
    if aside is not None:
        shutil.rmtree(aside)
    _print(read_summary(run_dir))


def _check_scheme(config: Config, local_device: str | None) -> None:
    """Raise here, before any actor starts, what learner and engine would raise of scheme and shapes.

    In a cluster, `local_device` None, an engine's processor is not known here: it looks itself.
    """
    keys = unquantized_config(Path(config.model.path))
    shapes = AutoConfig.from_pretrained(config.model.path, local_files_only=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shapes)
    for scheme in schemes_of(config.rollout):
        covered_linears(model, scheme)
        if local_device is not None:
            check_engine(scheme, keys, config.model.dtype, local_device)


class _Job:
    """The parts of one running job."""

    def __init__(self, config: Config, run_dir: Path, checkpoints: CheckpointStore, tracker: RunTracker) -> None:
        self._config, self._run_dir, self._checkpoints, self._tracker = config, run_dir, checkpoints, tracker
        self._scheme = scheme_at(config.rollout, config.train.steps)  # that of the final model

    def run(
        self,
        task: Task,
        prompts: list[Prompt],
        heldout: list[Prompt],
        saved: tuple[str, dict[str, Any]] | None,
    ) -> None:
        config, note = self._config, self._tracker.note
        for scheme in schemes_of(config.rollout):
            write_engine_config(self._engine_dir(scheme), Path(config.model.path), scheme)
        self._device = device_of(config)
        placement = Placement(config, self._device)
        fleet = placement.start_fleet(self._engine_dir, scheme_at(config.rollout, 1), note)
        learner = placement.start_learner(fleet)
        with ProcessRewardService(config.reward, note) as rewards:
            infos = fleet.infos()
            for info in infos:
                kernels = ", ".join(info.kernels) or "full precision"
                place = f"{info.device} ({info.node})"
                note(f"rollout worker {info.worker}: vLLM on {place}, {scheme_at(config.rollout, 1).label}, {kernels}")
            exact = self._check_numerics(learner)
            pool = make_pool(prompts, config.pool, derive_seed(config.seed, "pool"))
            augmenter = make_augmenter(config, task, pool, prompts, heldout)
            trainer = Trainer(
                config, learner, fleet, rewards, pool, self._tracker, heldout, self._checkpoints, exact, augmenter
            )
            if saved:
                note(f"continuing after step {saved[1]['step']}")
                trainer.resume(*saved)
            after = trainer.run()
            files = self._export(learner)
            infos += fleet.infos()  # a later stage has other kernels
            seconds, target = trainer.progress.train_seconds, self._run_dir / "control_sft"
            controls = run_controls(config, task, target, seconds, fleet, rewards, heldout, note)
            fleet.close()
            learner.close()
            if augmenter:
                augmenter.close()
        summary = self._summary(infos, trainer, after, controls, files)
        write_report(self._run_dir, summary)

    def _engine_dir(self, scheme: QuantScheme) -> Path:
        return self._run_dir / f"engine_model-{scheme.label}"

    def _check_numerics(self, learner: LearnerGroup) -> bool:
        """Print how the learner's arithmetic compares with the engine's; True when nothing differs."""
        if note := learner.processor_note():
            self._tracker.note(note)
        checks = learner.parity()
        numerics = numerics_of(self._config, self._device)
        if not checks:
            self._tracker.note(f"numerics {numerics}: not promised to be exact; the mismatch weight corrects")
            return False
        self._tracker.note(f"numerics {numerics}: {', '.join(map(str, checks))}")
        if all(check.exact for check in checks):
            return True
        self._tracker.note("this host does not reach zero mismatch; going on with the mismatch weight")
        return False

    def _export(self, learner: LearnerGroup) -> dict[str, str]:
        files = {"final model": str(self._run_dir / "final")}
        learner.export(files["final model"], quantized=False)
        if self._scheme.quantizes:
            files["quantized model"] = str(self._run_dir / f"final-{self._scheme.name}")
            learner.export(files["quantized model"], quantized=True)
        return files

    def _summary(
        self,
        infos: Sequence[WorkerInfo],
        trainer: Trainer,
        after: dict[str, float],
        controls: dict[str, float],
        files: dict[str, str],
    ) -> Summary:
        progress, config = trainer.progress, self._config
        rows = read_log(self._run_dir / METRICS_FILE)
        return Summary(
            run=config.run.name,
            scheme=" then ".join(scheme.label for scheme in schemes_of(config.rollout)),
            kernels=sorted({kernel for info in infos for kernel in info.kernels}),
            steps=progress.step,
            rollouts=progress.rollouts,
            train_seconds=progress.train_seconds,
            tokens_per_s=progress.tokens / progress.train_seconds,
            eval_before=progress.eval_before,
            eval_after=after,
            controls=controls,
            mismatch_aligned=_mismatch(rows, "mismatch/"),
            mismatch_unaligned=_mismatch(rows, "mismatch/unaligned_"),
            files={**files, "report": str(self._run_dir / "report.html"), "curves": str(self._run_dir / "curves.png")},
        )


def _mismatch(rows: Sequence[dict[str, Any]], prefix: str) -> dict[str, float]:
    """Over all logged steps: mean of the means, largest maximum, mean k3."""
    found = [row for row in rows if f"{prefix}logp_abs_mean" in row]
    if not found:
        return {}
    return {
        "mean": fmean(float(row[f"{prefix}logp_abs_mean"]) for row in found),
        "max": max(float(row[f"{prefix}logp_abs_max"]) for row in found),
        "k3": fmean(float(row[f"{prefix}k3_kl"]) for row in found),
    }


def _load_prompts(config: Config, task: Task, note: Callable[[str], None]) -> tuple[list[Prompt], list[Prompt]]:
    wanted = max(config.eval.num_prompts, config.eval.final_num_prompts)
    train, heldout = task.load(config.seed, wanted, note)
    room = config.rollout.max_model_len - config.rollout.sampling.max_new_tokens
    kept = [[p for p in prompts if len(p.token_ids) <= room] for prompts in (train, heldout)]
    if dropped := len(train) + len(heldout) - len(kept[0]) - len(kept[1]):
        note(f"{dropped} prompts of over {room} tokens left out: rollout.max_model_len less max_new_tokens")
    if not kept[0] or not kept[1]:
        raise DataError(
            f"no {'training' if not kept[0] else 'held-out'} prompt fits in {room} tokens",
            mend="raise rollout.max_model_len",
        )
    return kept[0], kept[1]


def _set_aside(run_dir: Path) -> Path | None:
    """Make room for a new run; the old one is kept under another name until the new one has ended well.

    Raises ConfigError when the folder is no run's.
    """
    if not run_dir.exists():
        return None
    if not (run_dir / "config.yaml").is_file():
        raise ConfigError(f"{run_dir} is no run's folder", mend="remove it yourself, or choose another run.name")
    aside = run_dir.with_name(f"{run_dir.name}.replaced")
    if aside.exists() and not (run_dir / SUMMARY_FILE).exists():
        shutil.rmtree(run_dir)  # a start-over that failed: what it was to replace is still the one to keep
        return aside
    if aside.exists():
        shutil.rmtree(aside)
    run_dir.rename(aside)
    return aside


def _print(summary: Summary) -> None:
    from rich.console import Console

    Console().print(render_summary(summary))

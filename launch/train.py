"""The main job: config in, trained model and report out. Everything is wired here."""

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from time import monotonic

import ray
from transformers.utils import logging as transformers_logging

from launch.cluster.connect import connect, ray_messages_logged
from launch.cluster.placement import Placement
from launch.demo.controls import run_controls
from launch.demo.pretrained import fetch_missing
from launch.demo.tiny_model import ensure_model
from launch.doctor import start_lines
from launch.machine import Machine, counts_line, sharing_line, with_counts
from launch.preflight import preflight
from launch.run.environments import Rewards, converse, start_rewards
from launch.run.files import only_writer
from launch.run.folder import RunFolder
from launch.run.prompts import fill_pool, load_prompts, make_augmenter, tokenizer_of
from launch.run.report import make_summary, read_summary, render_summary, write_report
from launch.run.resume import input_digests
from launch.run.terminal import Verbosity, console
from launch.run.tracking import RunTracker
from launch.run.wandb_run import check_login
from qarl.config.derived import numerics_of, sleeps
from qarl.config.run import Config
from qarl.config.schedule import scheme_at, schemes_of
from qarl.errors import AGAIN, QarlError
from qarl.logs import driver_log
from qarl.prompts.pool import Pool
from qarl.quant.publish import write_engine_config
from qarl.tasks.task import Task
from qarl.types import Activity, Prompt, WorkerInfo
from trainer.batches import train_from
from trainer.loop import Progress, Trainer
from trainer.ranks import LearnerGroup


def train(config: Config, log: Callable[[str], None] = print, verbosity: Verbosity = "normal") -> None:
    """Run, or continue, the run that `config` names. Prints the summary at the end, unless `verbosity` is "quiet".

    Raises QarlError: with the reason; UsageError before anything has been started.
    """
    transformers_logging.disable_progress_bar()
    config = with_counts(config)
    with ExitStack() as stack:
        stack.enter_context(only_writer(config.run.folder, log))
        folder = RunFolder(config, log)
        if folder.is_complete:
            log(folder.nothing_left)
        else:
            try:
                _run(config, folder, log, verbosity)
            except OSError as error:  # a full disk, a folder that became read-only
                raise QarlError(str(error).splitlines()[-1], str(folder.path), AGAIN) from error
        if verbosity != "quiet":
            console().print(render_summary(read_summary(folder.path)))


def _run(config: Config, folder: RunFolder, log: Callable[[str], None], verbosity: Verbosity) -> None:
    """Check everything, then begin the run or continue it."""
    with ExitStack() as stack:
        stack.callback(ray.shutdown)
        check_login(config)
        fetch_missing(config, log)
        machine = preflight(config)
        for line in (*start_lines(), counts_line(config, machine.device)):
            log(line)
        task, prompts, heldout = load_prompts(config, log)
        pool = fill_pool(config, prompts, log)
        ensure_model(config.model, config.task, config.seed, log, prompts)
        stack.enter_context(folder.begin(input_digests(config, prompts, heldout)))
        stack.callback(ray.shutdown)  # before a refused start removes its folder: actors write logs there
        stack.enter_context(driver_log(folder.logs / "driver.log"))
        if not config.debug.train_from:

            def on_fault(line: str) -> None:  # the tracker starts later
                tracker.note(line, level=logging.WARNING)

            rewards = stack.enter_context(closing(start_rewards(config, on_fault, folder.logs)))
            rewards.check([*prompts, *heldout])
        decode = tokenizer_of(config).decode
        tracker = RunTracker(config, folder.path, folder.step, config.train.steps, decode, verbosity)
        stack.enter_context(tracker)
        tracker.phase("start_ray")
        stack.enter_context(ray_messages_logged())
        connect(config)
        job = _Job(config, machine, folder, tracker, stack)
        if config.debug.train_from:
            job.train_from(Path(config.debug.train_from))
        else:
            job.run(task, pool, rewards, prompts, heldout)


class _Job:
    """The parts of one running job; `stack` closes them, last first, also when the job fails."""

    def __init__(
        self, config: Config, machine: Machine, folder: RunFolder, tracker: RunTracker, stack: ExitStack
    ) -> None:
        self._config, self._device, self._folder, self._tracker = config, machine.device, folder, tracker
        self._stack, self._log = stack, tracker.note

    def run(self, task: Task, pool: Pool, rewards: Rewards, prompts: list[Prompt], heldout: list[Prompt]) -> None:
        """Train, export, evaluate the controls, write the report."""
        config, folder, log = self._config, self._folder, self._log
        warn, keep = partial(log, level=logging.WARNING), self._stack.enter_context
        for scheme in schemes_of(config.rollout):
            write_engine_config(folder.engine_dir(scheme), Path(config.model.path), scheme)
        self._tracker.phase("start")
        placement = Placement(config, self._device, folder.logs)
        fleet = keep(closing(placement.start_fleet(folder.engine_dir, scheme_at(config.rollout, 1), warn)))
        self._tracker.watch("v", rewards.doing)
        self._tracker.watch("w", fleet.doing)
        self._tracker.watch("r", lambda: [Activity("starting")] * config.learner.num_ranks)
        learner = keep(closing(placement.start_learner(fleet.receivers)))
        self._tracker.watch("r", learner.doing)
        sampler = converse(config, fleet, rewards)
        infos = fleet.infos()
        self._log_workers(infos)
        if line := sharing_line(config, self._device):
            log(line)
        exact = self._check_numerics(learner)
        batches = folder.path / "batches" if config.debug.save_batches else None
        augmenter = make_augmenter(config, task, pool, prompts, heldout)
        if augmenter:
            keep(closing(augmenter))
        trainer = Trainer(
            config,
            learner,
            sampler,
            rewards,
            pool,
            self._tracker,
            heldout,
            folder.checkpoints,
            exact,
            augmenter,
            batches,
            sleeps=sleeps(config, self._device),
        )
        if folder.saved:
            log(f"continuing after step {folder.step}")
            trainer.resume(*folder.saved)
        if config.rollout.keep_kv:
            log(
                "rollout.keep_kv: responses that new weights interrupt keep their keys and values. Their log-probs "
                "from then on are those of no learner, and max |d log p| is above 0 there (mismatch/kept_kv_*)"
            )
        if config.debug.rollout_only:
            log("debug.rollout_only: no step updates the weights")
        after = trainer.run()
        files = self._export(learner)
        infos += fleet.infos()  # a later stage has other kernels
        if any(config.controls.model_dump().values()):
            self._tracker.phase("controls")
        seconds, target = trainer.progress.train_seconds, folder.path / "control_sft"
        controls = run_controls(config, task, target, seconds, sampler, rewards, heldout, log)
        self._tracker.phase("report")
        write_report(folder.path, make_summary(config, folder.path, infos, trainer.progress, after, controls, files))

    def train_from(self, batches: Path) -> None:
        """Train on saved batches, without an engine, export, write the report."""
        config, folder, progress = self._config, self._folder, Progress()
        self._log(f"debug.train_from: trains on the batches in {batches}, samples nothing")
        placement = Placement(config, self._device, folder.logs)
        learner = self._stack.enter_context(closing(placement.start_learner(lambda: [])))
        self._tracker.watch("r", learner.doing)
        start = monotonic()
        for step, lengths, metrics in train_from(batches, config, learner):
            seconds = monotonic() - start
            self._tracker.log(step, metrics | {"perf/tokens_per_s": sum(lengths) / (seconds - progress.train_seconds)})
            progress.step, progress.train_seconds = step, seconds
            progress.rollouts, progress.tokens = progress.rollouts + len(lengths), progress.tokens + sum(lengths)
        files = self._export(learner)
        write_report(folder.path, make_summary(config, folder.path, [], progress, {}, {}, files))

    def _log_workers(self, infos: Sequence[WorkerInfo]) -> None:
        scheme = scheme_at(self._config.rollout, 1)
        for info in infos:
            kernels = ", ".join(info.kernels) or "full precision"
            place = f"{info.device} ({info.node})"
            self._log(f"rollout worker {info.worker}: vLLM on {place}, {scheme.label}, {kernels}")
            if info.at_once < (most := self._config.rollout.max_num_seqs):
                self._log(
                    f"rollout worker {info.worker}: its KV cache holds {info.at_once} sequences of "
                    f"rollout.max_model_len, fewer than rollout.max_num_seqs {most}; others wait "
                    "(a larger rollout.kv_cache_gib holds more; with "
                    f"rollout.max_num_seqs={info.at_once} they wait for any worker)"
                )

    def _check_numerics(self, learner: LearnerGroup) -> bool:
        """Print how the learner's arithmetic compares with the engine's; True when nothing differs."""
        if note := learner.processor_note():
            self._log(note)
        checks = learner.parity()
        numerics = numerics_of(self._config, self._device)
        if not checks:
            self._log(f"numerics {numerics}: not promised to be exact; the mismatch weight corrects")
            return False
        self._log(f"numerics {numerics}: {', '.join(map(str, checks))}")
        if all(check.exact for check in checks):
            return True
        self._log("this host does not reach zero mismatch; going on with the mismatch weight")
        return False

    def _export(self, learner: LearnerGroup) -> dict[str, str]:
        self._tracker.phase("export")
        files = {"final model": str(self._folder.path / "final")}
        learner.export(files["final model"], quantized=False)
        scheme = scheme_at(self._config.rollout, self._config.train.steps)
        if scheme.quantizes:
            files["quantized model"] = str(self._folder.path / f"final-{scheme.name}")
            learner.export(files["quantized model"], quantized=True)
        self._tracker.exported({name: Path(folder) for name, folder in files.items()})
        return files

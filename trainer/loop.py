"""The training loop, over protocols: it does not know which engine samples or how many processes the learner has.

One step. Each stage waits for the one above it; `pool`, `fleet`, `rewards` and `learner` are partners that may live in
other processes, everything else runs here:

    collect    pool --prompts--> fleet --samples--> rewards --scores--> groups --> pool       trainer/collect.py
                 |
                 | groups: the responses to one prompt, scored
                 v
    build      groups --> records, one for each response, with its advantage                  trainer/step.py
    prove      records --> learner --pi_prox--> mismatch with the sampler --> records         trainer/proof.py
    diagnose   records --> error tokens, unaligned mismatch --> records with loss masks
    split      records --> minibatches of whole groups                                        trainer/step.py
    update     minibatches --> learner, one optimizer step for each
                 |
                 | new weights
                 v
    publish    learner --weights--> fleet --probe samples--> learner --> proof                trainer/proof.py

The next step samples from the new weights only: nothing is stale. Engines that share a GPU with the learner sleep from
the end of `collect` until the new weights have left the learner. With `train.max_staleness` groups of later steps are
sampled while this one is learned, and are up to as many versions older than the learner. Every `eval.every` steps an
evaluation, and every `train.checkpoint_every` steps a checkpoint, comes between two steps.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from qarl.config.run import Config
from qarl.config.schedule import scheme_at
from qarl.error_tokens import error_token_metrics, worst
from qarl.errors import DAMAGED, CheckpointError
from qarl.metrics import Value
from qarl.mismatch import Logprobs, Mismatch
from qarl.prompts.augment import Augmenter
from qarl.prompts.pool import Pool
from qarl.protocols import Fleet, Learner, RewardService, Tracker
from qarl.seeds import derive_seed
from qarl.trace import span
from qarl.types import Prompt, TrainSequence
from trainer.batches import batch_file, save_batch, update
from trainer.calls import LearnerCalls
from trainer.checkpoint import CheckpointStore
from trainer.clock import Clock
from trainer.collect import Collector, Group, collection_metrics
from trainer.evaluate import evaluate
from trainer.proof import ExactnessProof, Probe
from trainer.step import (
    Record,
    aligned_logprobs,
    at_sampled,
    build,
    compared,
    error_tokens_of,
    kept_kv_metrics,
    split,
    staleness_metrics,
    table_row,
    with_prox,
    without_error_tokens,
)
from trainer.timer import Timer


@dataclass
class Progress:
    """What a run remembers besides the learner and the pool; saved with each checkpoint."""

    step: int = 0
    rollouts: int = 0
    tokens: int = 0
    train_seconds: float = 0.0
    eval_before: dict[str, float] = field(default_factory=dict)


class Trainer:
    """Owns the order of things; see the head of this file.

    Args:
        exact: the learner's ops equal the engine's on this host; see `ExactnessProof`.
        sleeps: engines give their GPU memory back while the learner works. Not with `train.max_staleness`.
        augmenter: grows `pool`.
        batches: folder where each step's minibatches are saved; None saves none.
        clock: measures, waits and has the threads; the machine's own by default.
    """

    def __init__(
        self,
        config: Config,
        learner: Learner,
        fleet: Fleet,
        rewards: RewardService,
        pool: Pool,
        tracker: Tracker,
        heldout: Sequence[Prompt],
        checkpoints: CheckpointStore,
        exact: bool,
        augmenter: Augmenter | None = None,
        batches: Path | None = None,
        clock: Clock | None = None,
        sleeps: bool = False,
    ) -> None:
        self._clock = clock or Clock()
        self._config, self._learner, self._fleet, self._rewards = config, learner, fleet, rewards
        self._sleeps = sleeps
        self._pool, self._tracker, self._heldout = pool, tracker, heldout
        self._checkpoints, self._augmenter, self._batches = checkpoints, augmenter, batches
        self._scheme = scheme_at(config.rollout, 1)
        self._proof = ExactnessProof(config, exact, tracker.note, tracker.alert)
        self._collector = Collector(config, fleet, rewards, pool, augmenter, self._clock)
        # Groups are sampled and scored while the learner computes.
        ahead = partial(self._collector.advance, 0.0) if config.train.max_staleness else None
        self._calls = LearnerCalls(self._clock, ahead)
        self._probe = Probe(config, lambda rows: self._calls.alone(learner.score, rows), heldout, self._proof)
        self._in_flight: list[tuple[str, int]] = []  # in the checkpoint that the run continues from
        self.progress = Progress()

    def resume(self, directory: str, state: Mapping[str, Any]) -> None:
        """Continue after the checkpoint at `directory` with its `state`. Raises CheckpointError when a part of it is
        missing or damaged."""
        required = ["pool", "progress", *(["augment"] if self._augmenter else [])]
        if missing := [key for key in required if not isinstance(state.get(key), Mapping)]:
            raise CheckpointError(f"its state has no {' and no '.join(missing)}", directory, DAMAGED)
        # Older checkpoints hold a count of exact steps, which this process has to prove itself.
        saved = {key: value for key, value in state["progress"].items() if key != "exact_steps"}
        try:
            progress = Progress(**saved)
        except TypeError as error:
            raise CheckpointError(f"its progress is damaged ({error})", directory, DAMAGED) from error
        self._pool.load_state_dict(state["pool"])
        if self._augmenter:
            self._augmenter.load_state_dict(state["augment"])
        self._learner.load(directory)
        self._in_flight = state.get("in_flight", [])
        self.progress = progress

    def run(self) -> dict[str, float]:
        """Train to `train.steps`; returns the final evaluation."""
        config, progress = self._config, self.progress
        self._set_precision(progress.step)  # a resumed run may be in a later stage
        self._tracker.phase("publish")
        with span("publish"):
            self._publish(progress.step)
        self._collector.resume(self._in_flight)
        if not progress.eval_before:
            progress.eval_before = self._evaluate(config.eval.final_num_prompts)
        while progress.step < config.train.steps:
            self._train_step(progress.step + 1)
            last = progress.step == config.train.steps
            if progress.step % config.eval.every == 0 and not last:
                self._evaluate(config.eval.num_prompts)
            if progress.step % config.train.checkpoint_every == 0 or last:
                self._save()
        return self._evaluate(config.eval.final_num_prompts)

    def _train_step(self, step: int) -> None:
        timer, metrics = Timer(self._tracker.phase, self._clock), dict[str, Value]()
        self._calls.begin()
        with timer("step", f"step {step}"):
            busy_before_s = self._fleet.busy_s()
            if self._set_precision(step):
                self._publish(step - 1)
            groups, used = self._collector.collect(step, timer)
            metrics |= {**collection_metrics(groups, self._config), **self._collector.metrics(), **self._pool.metrics()}
            if self._augmenter:
                metrics |= self._augmenter.metrics()
                self._tracker.augmented(step, self._augmenter.outcomes())
            if not groups:
                self._tracker.note(f"step {step} trains nothing: {self._collector.why_none()}")
            if self._sleeps:
                with timer("sleep"):
                    self._fleet.sleep()
            metrics |= self._learn(used, step, timer)
            if self._publishes(step):
                with timer("publish"):
                    metrics |= self._publish(step)
            busy_s = self._fleet.busy_s() - busy_before_s
        metrics |= self._advance(step, groups, timer, busy_s)
        self._tracker.log(step, metrics)

    def _learn(self, groups: Sequence[Group], step: int, timer: Timer) -> dict[str, Value]:
        """Update on the groups; returns metrics."""
        config = self._config
        records = build(groups, config)
        metrics: dict[str, Value] = {"actor/groups_used": float(len({r.group for r in records if r.used}))}
        if records:
            records, proved = self._prove(records, step, timer)
            records, diagnosed = self._diagnose(records, step, timer)
            metrics |= {**proved, **diagnosed}
        minibatches = split(records, config.learner.minibatches, derive_seed(config.seed, "minibatches", step))
        if self._batches:
            save_batch(batch_file(self._batches, step), minibatches)
        if groups and not minibatches:
            self._tracker.note(f"step {step} trains nothing: in each of its {len(groups)} groups all rewards are equal")
        if minibatches and not config.debug.rollout_only:
            metrics |= self._update(minibatches, step, timer)
        if step % config.tracking.table_every == 0:
            with timer("table"):
                self._show_samples(records[: config.tracking.table_rows], step)
        return metrics

    def _prove(self, records: list[Record], step: int, timer: Timer) -> tuple[list[Record], dict[str, float]]:
        """Give every record log pi_prox: the learner's, which the proof compares with the sampler's, or, once they are
        proven equal, the sampler's. A share of what older weights sampled is compared with the learner of then."""
        sampler = [record.sequence.sampler_logprobs_T for record in records]
        is_stale = any(record.sample.versions != [step - 1] for record in records)
        if not is_stale and self._proof.trusts_sampler(step):
            return with_prox(records, sampler), {}
        with timer("prox"):
            prox = self._calls.during(self._learner.score, [record.sequence for record in records])
            earlier = self._rescored(records, step)
        metrics: dict[str, float] = {}
        keep_kv = self._config.rollout.keep_kv
        ours, theirs = compared(records, prox, step - 1, keep_kv)
        if self._config.mismatch.stale_share:
            metrics["mismatch/stale_compared"] = float(len(earlier))
            ours, theirs = [*ours, *(own for own, _ in earlier)], [*theirs, *(other for _, other in earlier)]
        if any(map(len, theirs)):
            metrics |= self._proof.observe(ours, theirs, step)
        if self._config.train.max_staleness:
            metrics |= staleness_metrics(records, prox, step)
        if keep_kv:
            metrics |= kept_kv_metrics(records, prox, step - 1)
        return with_prox(records, prox), metrics

    def _rescored(self, records: Sequence[Record], step: int) -> list[tuple[Logprobs, Logprobs]]:
        """Log-probs by the weights that sampled, of learner and sampler, for `mismatch.stale_share` of what is stale:
        of the tokens of one older version in a response; with `rollout.keep_kv` of its first one alone."""
        config, found = self._config, list[tuple[Logprobs, Logprobs]]()
        keep_kv = config.rollout.keep_kv
        pairs = [
            (record, version) for record in records for version in record.sample.versions[: 1 if keep_kv else None]
        ]
        stale = [(record, version) for record, version in pairs if version < step - 1]
        count = math.ceil(config.mismatch.stale_share * len(stale))
        chosen = Random(derive_seed(config.seed, "stale", step)).sample(stale, count)
        for version, ones in groupby(sorted(chosen, key=itemgetter(1)), key=itemgetter(1)):
            sequences = [record.sequence for record, _ in ones]
            scores = self._calls.during(self._learner.score, sequences, version=version)
            found += [
                (sequence.at_sampled(score_T, version), sequence.at_sampled(sequence.sampler_logprobs_T, version))
                for sequence, score_T in zip(sequences, scores, strict=True)
            ]
        return found

    def _diagnose(self, records: list[Record], step: int, timer: Timer) -> tuple[list[Record], dict[str, float]]:
        """Measure what the unaligned model would give, and error tokens, which `error_tokens.mode: mask` masks."""
        every, mode = self._config.mismatch.unaligned_every, self._config.error_tokens.mode
        metrics: dict[str, float] = {}
        if every and step % every == 0:
            count = min(len(records), self._config.mismatch.unaligned_sequences)
            chosen = Random(derive_seed(self._config.seed, "unaligned", step)).sample(records, count)
            with timer("unaligned"):
                plain = self._calls.during(self._learner.score, [r.sequence for r in chosen], aligned=False)
            sampler = [aligned_logprobs(record, step) for record in chosen]
            pairs = at_sampled(chosen, plain), at_sampled(chosen, sampler)
            unaligned = Mismatch.between(*pairs, self._config.mismatch.token_bounds)
            metrics |= unaligned.metrics("mismatch/unaligned_")
        if mode != "off":
            with timer("error_tokens"):
                records, found = self._find_error_tokens(records, step)
            metrics |= found
        return records, metrics

    def _update(self, minibatches: list[list[TrainSequence]], step: int, timer: Timer) -> dict[str, Value]:
        self._probe.learner_moved_on = True
        with timer("update"):
            result = self._calls.during(update, self._learner, minibatches, step)
        deviation = result.first_minibatch_ratio_dev
        if deviation != 0:
            self._proof.reset(f"step {step}: the first minibatch has max |r_seq - 1| {deviation:.2e}")
        return result.all_metrics()

    def _publishes(self, step: int) -> bool:
        """Whether engines get the weights of `step`: when samples would be too old else, and before evaluations."""
        train = self._config.train
        return step % train.publish_every == 0 or step % self._config.eval.every == 0 or step == train.steps

    def _publish(self, version: int) -> dict[str, float]:
        """Give every engine the learner's weights, and check them with a probe. Engines that sleep wake for it."""
        weights = self._calls.alone(self._learner.publish, version)
        if self._sleeps:
            self._fleet.wake()
        self._probe.learner_moved_on = False  # a worker that was replaced until now had the weights before
        gaps = self._fleet.load(weights, self._probe)
        self._collector.published(version)
        return {"mismatch/probe_logp_abs_max": float(np.max(list(gaps.values())))}

    def _set_precision(self, step: int) -> bool:
        """Bring learner and engines into the scheme of `step`; returns whether the scheme has changed."""
        scheme = scheme_at(self._config.rollout, step)
        if scheme == self._scheme:
            return False
        self._scheme = scheme
        dropped = self._collector.give_back()  # no sample of one scheme is learned from in another
        exact = self._calls.alone(self._learner.switch, scheme)
        self._fleet.switch(scheme)
        self._proof.restart(exact)
        ending = "" if exact else ", not promised to be exact"
        ending += f"; {dropped} groups in flight went back to the pool" if dropped else ""
        self._tracker.note(f"step {step}: rollouts and training in {scheme.label} from here on{ending}")
        return True

    def _find_error_tokens(self, records: list[Record], step: int) -> tuple[list[Record], dict[str, float]]:
        """Measure error tokens, and show the responses that have most of them."""
        config = self._config.error_tokens
        found = error_tokens_of(records, config)
        if config.table_every and step % config.table_every == 0 and (rows := worst(found, config.table_rows)):
            table = [table_row(records[i], found[i], step, self._config) for i in rows]
            self._tracker.table(step, "error_tokens", table)
        metrics = error_token_metrics(found, [record.sequence.advantage for record in records])
        return without_error_tokens(records, found) if config.mode == "mask" else records, metrics

    def _show_samples(self, records: list[Record], step: int) -> None:
        """Put responses into the sample table, with what the update did to their probabilities."""
        after = self._calls.during(self._learner.score, [record.sequence for record in records])
        off = self._config.error_tokens.mode == "off"
        found = [None] * len(records) if off else error_tokens_of(records, self._config.error_tokens)
        rows = zip(records, found, after, strict=True)
        table = [table_row(record, tokens, step, self._config, after_T) for record, tokens, after_T in rows]
        self._tracker.table(step, "samples", table)

    def _advance(self, step: int, groups: Sequence[Group], timer: Timer, busy_s: float) -> dict[str, float]:
        """Count a finished step, in which workers had groups for `busy_s`; returns metrics of time and throughput."""
        progress, seconds = self.progress, timer.seconds["step"]
        samples = [sample for group in groups for sample in group.samples]
        tokens = sum(sample.num_sampled for sample in samples)
        progress.step, progress.train_seconds = step, progress.train_seconds + seconds
        progress.rollouts, progress.tokens = progress.rollouts + len(samples), progress.tokens + tokens
        in_turn = not self._config.train.max_staleness  # else the step only waits for what was sampled meanwhile
        return {
            **timer.metrics(),
            "training/rollouts": float(progress.rollouts),
            "perf/tokens_per_s": tokens / seconds,
            **({"perf/sample_tokens_per_s": tokens / timer.seconds["sample"]} if in_turn else {}),
            "perf/workers_idle": 1.0 - busy_s / seconds,
            "perf/learner_idle": 1.0 - self._calls.seconds() / seconds,
        }

    @span("evaluate")
    def _evaluate(self, num_prompts: int) -> dict[str, float]:
        self._tracker.phase("evaluate")
        self._collector.wait_for_scores()
        prompts = self._heldout[:num_prompts]
        with self._collector.while_others_sample():
            result = evaluate(self._fleet, self._rewards, prompts, self._config)
        values = {**result, "num_prompts": float(len(prompts))}
        self._tracker.log(self.progress.step, {f"eval/{name}": value for name, value in values.items()})
        return result

    @span("checkpoint")
    def _save(self) -> None:
        self._tracker.phase("checkpoint")
        state: dict[str, Any] = {"progress": vars(self.progress), "pool": self._pool.state_dict()}
        if self._augmenter:
            state["augment"] = self._augmenter.state_dict()
        if self._config.train.max_staleness:
            state["in_flight"] = self._collector.in_flight()
        # What is sampled and scored meanwhile stays in flight: nothing of `state` changes.
        self._calls.during(self._checkpoints.save, self.progress.step, self._learner.save, state)

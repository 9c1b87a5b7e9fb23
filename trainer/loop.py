"""The training loop, over protocols: it does not know which engine samples or how the learner is spread."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice, pairwise
from typing import Any

import numpy as np

from qarl.advantages import advantages, has_variance
from qarl.config.run import Config
from qarl.config.schedule import scheme_at
from qarl.error_tokens import error_token_metrics, find_error_tokens, worst
from qarl.errors import CheckpointError, MismatchError, ObjectiveError, PublicationError
from qarl.metrics import Value
from qarl.mismatch import Logprobs, Mismatch, by_quartile
from qarl.prompts.augment import Augmenter
from qarl.protocols import Fleet, Learner, PromptPool, RewardService, Tracker
from qarl.seeds import derive_seed
from qarl.types import Prompt, Sample, SampleRequest, TrainSequence
from trainer.checkpoint import CheckpointStore
from trainer.collect import Collector, Group, collection_metrics, shaped_rewards
from trainer.evaluate import evaluate

PROBE_PROMPTS = 4
PROBE_TOKENS = 16


@dataclass
class Progress:
    """What a run remembers besides the learner and the pool; saved with each checkpoint."""

    step: int = 0
    rollouts: int = 0
    tokens: int = 0
    train_seconds: float = 0.0
    exact_steps: int = 0
    """Steps in a row whose max |d log p| was zero."""
    eval_before: dict[str, float] = field(default_factory=dict)


class Trainer:
    """Owns the order of things: draw, sample, score, observe, advantages, prox, update, publish, save."""

    def __init__(
        self,
        config: Config,
        learner: Learner,
        fleet: Fleet,
        rewards: RewardService,
        pool: PromptPool,
        tracker: Tracker,
        heldout: Sequence[Prompt],
        checkpoints: CheckpointStore,
        exact: bool,
        augmenter: Augmenter | None = None,
    ) -> None:
        """`exact`: the learner's ops equal the engine's on this host. The first publication's probe confirms it; from
        then on a probe that shows any mismatch means wrong weights, and stops the run. `augmenter` grows `pool`."""
        self._config, self._learner, self._fleet, self._rewards = config, learner, fleet, rewards
        self._pool, self._tracker, self._heldout = pool, tracker, heldout
        self._checkpoints, self._exact = checkpoints, exact
        self._scheme = scheme_at(config.rollout, 1)
        self._augmenter = augmenter
        self._collector = Collector(config, fleet, rewards, pool, augmenter, self._timed, self._publish)
        self.progress = Progress()
        self._timing: dict[str, float] = {}
        self._proven = False  # whether a publication's probe has passed in this process
        self._above = False  # whether the last step's mismatch was above mismatch.warn_above

    def resume(self, directory: str, state: Mapping[str, Any]) -> None:
        """Continue after the checkpoint at `directory` with its `state`. Raises CheckpointError when a part of it is
        missing or damaged."""
        wanted = ["pool", "progress", *(["augment"] if self._augmenter else [])]
        if missing := [key for key in wanted if not isinstance(state.get(key), Mapping)]:
            mend = "delete the folder to use the checkpoint before"
            raise CheckpointError(f"its state has no {' and no '.join(missing)}", where=directory, mend=mend)
        try:
            progress = Progress(**state["progress"])
        except TypeError as error:
            raise CheckpointError(f"its progress is damaged ({error})", where=directory) from None
        self._pool.load_state_dict(state["pool"])
        if self._augmenter:
            self._augmenter.load_state_dict(state["augment"])
        self._learner.load(directory)
        self.progress = progress
        self.progress.exact_steps = 0  # this process, or this host, has yet to prove it

    def run(self) -> dict[str, float]:
        """Train to `train.steps`; returns the final evaluation."""
        config, progress = self._config, self.progress
        self._set_precision(progress.step)  # a resumed run may be in a later stage
        self._publish()
        if not progress.eval_before:
            progress.eval_before = self._evaluate(config.eval.final_num_prompts)
        while progress.step < config.train.steps:
            self._train_step()
            last = progress.step == config.train.steps
            if progress.step % config.eval.every == 0 and not last:
                self._evaluate(config.eval.num_prompts)
            if progress.step % config.train.checkpoint_every == 0 or last:
                self._save()
        return self._evaluate(config.eval.final_num_prompts)

    def _train_step(self) -> None:
        progress, started = self.progress, time.perf_counter()
        self._timing = {}
        step = progress.step + 1
        if self._set_precision(step):
            self._publish()
        groups, used = self._collector.collect(step)
        metrics: dict[str, Value] = {**collection_metrics(groups, self._config), **self._pool.metrics()}
        if self._augmenter:
            metrics |= self._augmenter.metrics()
            self._tracker.augmented(step, self._augmenter.outcomes())
        metrics |= self._learn(used, step)
        with self._timed("publish"):
            metrics |= self._publish(step)
        seconds = time.perf_counter() - started
        tokens = sum(len(sample.response_ids) for group in groups for sample in group.samples)
        progress.step, progress.train_seconds = step, progress.train_seconds + seconds
        progress.rollouts += sum(len(group.samples) for group in groups)
        progress.tokens += tokens
        metrics |= {f"timing_s/{name}": value for name, value in self._timing.items()}
        metrics |= {"timing_s/step": seconds, "perf/tokens_per_s": tokens / seconds}
        metrics["training/rollouts"] = float(progress.rollouts)
        if sample_s := self._timing.get("sample"):
            metrics["perf/sample_tokens_per_s"] = tokens / sample_s
        self._tracker.log(step, metrics)
        if step % self._config.tracking.table_every == 0:
            shown = groups[:4]
            self._tracker.table(step, [s for g in shown for s in g.samples], [s for g in shown for s in g.scores])

    def _set_precision(self, step: int) -> bool:
        """Bring learner and engines into the scheme of `step`; True when it is another than before."""
        scheme = scheme_at(self._config.rollout, step)
        if scheme == self._scheme:
            return False
        self._scheme, self._proven = scheme, False
        self.progress.exact_steps = 0
        self._exact = self._learner.switch(scheme)
        self._fleet.switch(scheme)
        exact = "" if self._exact else ", not promised to be exact"
        self._tracker.note(f"step {step}: rollouts and training in {scheme.label} from here on{exact}")
        return True

    def _learn(self, groups: Sequence[Group], step: int) -> dict[str, Value]:
        """Score every sample under the learner, then update on the groups that tell anything."""
        config = self._config
        rewards = [shaped_rewards(group, config) for group in groups]
        values = advantages(rewards, config.advantage, [group.prompt_id for group in groups])
        batches = [
            [
                _sequence(sample, advantage, f"{group.prompt_id}#{index}")
                for index, (sample, advantage) in enumerate(zip(group.samples, advantages_G, strict=True))
            ]
            for group, advantages_G in zip(groups, values, strict=True)
        ]
        everything = [sequence for batch in batches for sequence in batch]
        sampler = [sequence.sampler_logprobs_T for sequence in everything]
        metrics: dict[str, Value] = {}
        if config.learner.prox == "sampler" and self.progress.exact_steps >= config.mismatch.proof_steps:
            prox_all = sampler
        elif everything:
            with self._timed("prox"):
                prox_all = self._learner.score(everything)
            metrics |= self._check_mismatch(prox_all, sampler, step)
        else:
            prox_all = []
        if everything and config.mismatch.unaligned_every and step % config.mismatch.unaligned_every == 0:
            with self._timed("unaligned"):
                plain = self._learner.score(everything, aligned=False)
            unaligned = Mismatch.between(plain, sampler, config.mismatch.token_bounds)
            metrics |= unaligned.metrics("mismatch/unaligned_")
        if everything and config.error_tokens.mode != "off":
            with self._timed("error_tokens"):
                everything, shares = self._find_error_tokens(groups, everything, prox_all, step)
            metrics |= shares
        pairs = zip(everything, prox_all, strict=True)
        learnable = [[pair for pair in islice(pairs, len(batch)) if not _masked(pair[0])] for batch in batches]
        keep = [i for i, r in enumerate(rewards) if has_variance(r) or not config.advantage.drop_zero_variance]
        metrics["actor/groups_used"] = float(len(keep))
        # The pool draws unseen prompts first: a mix of both kinds in every minibatch.
        random.Random(derive_seed(config.seed, "minibatches", step)).shuffle(keep)
        parts = _split(keep, config.learner.minibatches) if keep else []
        minibatches = [[pair for i in part for pair in learnable[i]] for part in parts]
        if minibatches := [minibatch for minibatch in minibatches if minibatch]:
            with self._timed("update"):
                metrics |= self._update(minibatches, step)
            if metrics.get("actor/seq_ratio_max_dev_first_minibatch", 0.0) != 0.0:
                self.progress.exact_steps = 0
        return metrics

    def _update(self, minibatches: Sequence[Sequence[tuple[TrainSequence, Logprobs]]], step: int) -> dict[str, Value]:
        try:
            return self._learner.update(
                [[sequence for sequence, _ in minibatch] for minibatch in minibatches],
                [[prox for _, prox in minibatch] for minibatch in minibatches],
            )
        except ObjectiveError as error:
            raise type(error)(error.what, f"step {step}", error.mend) from error

    def _find_error_tokens(
        self, groups: Sequence[Group], sequences: list[TrainSequence], prox: Sequence[Logprobs], step: int
    ) -> tuple[list[TrainSequence], dict[str, float]]:
        """Measure error tokens, show the responses with most of them, and mask them where asked."""
        config = self._config.error_tokens
        samples = [sample for group in groups for sample in group.samples]
        scores = [score for group in groups for score in group.scores]
        found = [find_error_tokens(s.response_ids, s.text, p, config) for s, p in zip(samples, prox, strict=True)]
        if config.table_every and step % config.table_every == 0 and (rows := worst(found, config.table_rows)):
            columns = [found[i].columns() | {"advantage": sequences[i].advantage} for i in rows]
            self._tracker.table(step, [samples[i] for i in rows], [scores[i] for i in rows], "error_tokens", columns)
        if config.mode == "mask":
            sequences = [replace(s, loss_mask_T=~tokens.any_T) for s, tokens in zip(sequences, found, strict=True)]
        return sequences, error_token_metrics(found, [sequence.advantage for sequence in sequences])

    def _check_mismatch(self, learner: list[Logprobs], sampler: list[Logprobs], step: int) -> dict[str, float]:
        config = self._config.mismatch
        mismatch = Mismatch.between(learner, sampler, config.token_bounds)
        progress, stop, warn = self.progress, config.stop_above, config.warn_above
        if self._exact and progress.exact_steps and mismatch.abs_max != 0:
            self._tracker.note(f"step {step}: the mismatch is no longer zero, max |d log p| {mismatch.abs_max:.2e}")
        progress.exact_steps = progress.exact_steps + 1 if mismatch.abs_max == 0 else 0
        if stop is not None and not mismatch.abs_max <= stop:  # NaN stops, too
            raise MismatchError(
                f"max |d log p| between learner and sampler is {mismatch.abs_max:.2e}, above "
                f"mismatch.stop_above={stop:g}",
                where=f"step {step}",
                mend="a smaller learner.optimizer.lr, learner.numerics=engine, or a higher bound",
            )
        above = warn is not None and not mismatch.abs_max <= warn
        if above and not self._above:
            self._tracker.note(
                f"step {step}: max |d log p| {mismatch.abs_max:.2e} is above mismatch.warn_above={warn:g}, mean "
                f"{mismatch.abs_mean:.2e}; said again once it has been below"
            )
        self._above = above
        metrics = mismatch.metrics()
        for number, part in by_quartile(learner, sampler, config.token_bounds).items():
            metrics |= part.metrics(f"mismatch/q{number}_")
        return metrics

    def _publish(self, version: int | None = None) -> dict[str, float]:
        """Send the learner's weights to every engine, and see with a probe that they took."""
        version = self.progress.step if version is None else version
        weights = self._learner.publish(version)
        sampling = self._config.rollout.sampling
        probe = [
            SampleRequest(
                prompt,
                derive_seed(self._config.seed, "probe", version, index),
                sampling.temperature,
                min(PROBE_TOKENS, sampling.max_new_tokens),
            )
            for index, prompt in enumerate(self._heldout[:PROBE_PROMPTS])
        ]
        gaps = []
        for samples in self._fleet.load(weights, probe):
            sequences = [_sequence(sample) for sample in samples]
            mismatch = Mismatch.between(self._learner.score(sequences), [s.sampler_logprobs_T for s in sequences])
            gaps.append(mismatch.abs_max)
        if self._config.learner.aligned:
            self._prove(gaps, version)
        return {"mismatch/probe_logp_abs_max": float(np.max(gaps))}

    def _prove(self, gaps: Sequence[float], version: int) -> None:
        """Judge the largest |d log p| that each worker showed on the probe prompts (NaN is no proof)."""
        config = self._config.mismatch
        if self._exact and not self._proven and any(gap > 0 for gap in gaps):
            # Every compared op is equal and yet the whole is not: attention, norms or activations differ here.
            self._exact = False
            self._tracker.note(
                f"this host does not reach zero mismatch (probe: max |d log p| {max(gaps):.2e}, in attention, norm or "
                "activation); going on with the mismatch weight"
            )
        bound = 0.0 if self._exact else config.probe_bound
        for worker, gap in enumerate(gaps):
            if not gap <= bound:
                raise PublicationError(
                    f"the engine does not compute what was published: max |d log p| {gap:.2e} on the probe prompts, at "
                    f"most {bound:g} expected",
                    where=f"rollout worker {worker}, weights version {version}",
                    mend="the same command continues from the last checkpoint"
                    if self._exact
                    else "raise mismatch.probe_bound if this gap is the numerics' own",
                )
        self._proven = True

    def _evaluate(self, num_prompts: int) -> dict[str, float]:
        prompts = self._heldout[:num_prompts]
        result = evaluate(self._fleet, self._rewards, prompts, self._config)
        self._tracker.log(self.progress.step, {f"eval/{name}": value for name, value in result.items()})
        return result

    def _save(self) -> None:
        state = {"progress": vars(self.progress), "pool": self._pool.state_dict()}
        if self._augmenter:
            state["augment"] = self._augmenter.state_dict()
        self._checkpoints.save(self.progress.step, self._learner.save, state)

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self._timing[name] = self._timing.get(name, 0.0) + time.perf_counter() - started


def _sequence(sample: Sample, advantage: float = 0.0, name: str = "") -> TrainSequence:
    return TrainSequence(sample.prompt.token_ids, sample.response_ids, sample.logprobs_T, advantage, id=name)


def _masked(sequence: TrainSequence) -> bool:
    """Whether the mask leaves nothing of the response. Not so of an empty one: that is an error of the objective."""
    return bool(sequence.response_ids) and sequence.loss_tokens == 0


def _split(items: Sequence[int], parts: int) -> list[list[int]]:
    """`items` in at most `parts` runs of nearly equal length, none empty."""
    parts = min(parts, len(items))
    bounds = [len(items) * i // parts for i in range(parts + 1)]
    return [list(items[a:b]) for a, b in pairwise(bounds)]

"""The proof that learner and sampler agree: a probe of every publication, and a count of steps without mismatch."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from qarl.config.policy import PROBE_PROMPTS
from qarl.config.run import Config
from qarl.errors import AGAIN, MismatchError, PublicationError
from qarl.mismatch import Logprobs, Mismatch, by_quartile
from qarl.seeds import derive_seed
from qarl.types import Prompt, Sample, SampleRequest, TrainSequence

PROBE_TOKENS = 16
"""Tokens of a response at first and in every `rollout.read_back_every`-th publication."""
SHORT_PROBE_TOKENS = 4
"""Tokens of a response in the others: decoding is most of what a publication costs."""
LEFT_ZERO = "mismatch no longer zero"
"""Title of the alert. It comes again only after a step without mismatch."""


class ExactnessProof:
    """What this process knows of the mismatch between learner and sampler, and what follows from it.

    Args:
        config: the sections `mismatch` and `learner` count.
        exact: the learner's ops equal the engine's on this host. The first probe confirms it. From then on a probe that
            shows any mismatch means wrong weights, and stops the run.
        log: takes one line for the user.
        alert: takes a title and one line, for a person to look at.
    """

    def __init__(
        self, config: Config, exact: bool, log: Callable[[str], None], alert: Callable[[str, str], None]
    ) -> None:
        self._config, self._learner, self._log, self._alert = config.mismatch, config.learner, log, alert
        self.restart(exact)

    @property
    def is_made(self) -> bool:
        """Whether enough steps in a row had no mismatch."""
        return self._exact_steps >= self._config.proof_steps

    def trusts_sampler(self, step: int) -> bool:
        """Whether the sampler's log-probs stand for the learner's in this step, which then makes no proof."""
        return self._learner.prox == "auto" and self.is_made and step % self._config.proof_every != 0

    def restart(self, exact: bool) -> None:
        """Forget everything: learner and engines compute in another scheme from now on. `exact` as in the class."""
        self._exact = exact
        self._probed = False  # whether a probe has passed
        self._exact_steps = 0  # steps in a row whose max |d log p| was 0

    def reset(self, reason: str) -> None:
        """Start the count of exact steps again; `reason` is an alert when that ends a proof."""
        if self.is_made:
            trusted = self._learner.prox == "auto"
            self._alert(LEFT_ZERO, reason + (": the sampler's log-probs are no longer trusted" if trusted else ""))
        self._exact_steps = 0

    def observe(self, learner: Sequence[Logprobs], sampler: Sequence[Logprobs], step: int) -> dict[str, float]:
        """Count a step's log-probs under both policies; returns the mismatch metrics.

        Raises MismatchError when max |d log p| is above `mismatch.stop_above`, or NaN.
        """
        bounds = self._config.token_bounds
        mismatch = Mismatch.between(learner, sampler, bounds)
        if mismatch.abs_max == 0:
            self._exact_steps += 1
        else:
            line = f"step {step}: the mismatch is no longer zero, max |d log p| {mismatch.abs_max:.2e}"
            if self._exact and self._exact_steps and not self.is_made:  # the end of a proof is an alert on every host
                self._alert(LEFT_ZERO, line)
            self.reset(line)
        self._check_bounds(mismatch, step)
        metrics = mismatch.metrics()
        for number, part in by_quartile(learner, sampler, bounds).items():
            metrics |= part.metrics(f"mismatch/q{number}_")
        return metrics

    def probe(self, gaps: Mapping[int, float], version: int) -> None:
        """Judge a publication by the max |d log p| of each worker on the probe prompts.

        Raises PublicationError when one is above the bound, or NaN. An unaligned learner has no bound.
        """
        if not self._learner.aligned:
            return
        if self._exact and not self._probed and any(gap > 0 for gap in gaps.values()):
            # Every op that was compared is equal, but the policies are not: attention, norm or activation differs.
            self._exact = False
            self._log(
                f"this host does not reach zero mismatch (probe: max |d log p| {max(gaps.values()):.2e}, in attention, "
                "norm or activation); going on with the mismatch weight"
            )
        bound = 0.0 if self._exact else self._config.probe_bound
        for worker, gap in gaps.items():
            if not gap <= bound:  # NaN is above every bound
                raise PublicationError(
                    f"the engine does not compute what was published: max |d log p| {gap:.2e} on the probe prompts, at "
                    f"most {bound:g} expected",
                    where=f"rollout worker {worker}, weights version {version}",
                    hint=AGAIN if self._exact else "raise mismatch.probe_bound if this gap is the numerics' own",
                )
        self._probed = True

    def _check_bounds(self, mismatch: Mismatch, step: int) -> None:
        stop = self._config.stop_above
        if stop is not None and not mismatch.abs_max <= stop:  # NaN stops, too
            raise MismatchError(
                f"max |d log p| between learner and sampler is {mismatch.abs_max:.2e}, above "
                f"mismatch.stop_above={stop:g}",
                where=f"step {step}",
                hint="a smaller learner.optimizer.lr, learner.numerics=engine, or a higher bound",
            )


class Probe:
    """A `Prover`: samples a few held-out prompts on every worker, scores them with the learner; the proof judges.

    Once the learner has moved on from a version, a worker that is replaced must sample as those did that were judged.

    Args:
        score: the learner's `score`.
    """

    def __init__(
        self,
        config: Config,
        score: Callable[[Sequence[TrainSequence]], Sequence[Logprobs]],
        prompts: Sequence[Prompt],
        proof: ExactnessProof,
    ) -> None:
        self._seed, self._rollout = config.seed, config.rollout
        self._score, self._prompts, self._proof = score, prompts[:PROBE_PROMPTS], proof
        self._first: int | None = None  # this process's first version
        self._judged: Sequence[Sample] = ()  # a worker's samples that have passed
        self.learner_moved_on = False  # whether the learner has updated since the publication

    def requests(self, version: int) -> list[SampleRequest]:
        if self._first is None:
            self._first = version
        long = (version - self._first) % self._rollout.read_back_every == 0
        sampling = self._rollout.sampling
        tokens = min(PROBE_TOKENS if long else SHORT_PROBE_TOKENS, sampling.max_new_tokens)
        return [
            SampleRequest(prompt, derive_seed(self._seed, "probe", version, index), sampling.temperature, tokens)
            for index, prompt in enumerate(self._prompts)
        ]

    def judge(self, samples: Mapping[int, Sequence[Sample]], version: int) -> dict[int, float]:
        if self.learner_moved_on:
            gaps = {worker: _largest_gap(of_worker, self._judged) for worker, of_worker in samples.items()}
        else:
            gaps = self._compared_with_learner(samples)
        self._proof.probe(gaps, version)
        self._judged = next(iter(samples.values()))
        return gaps

    def _compared_with_learner(self, samples: Mapping[int, Sequence[Sample]]) -> dict[int, float]:
        sequences = {worker: [TrainSequence.of(s) for s in of_worker] for worker, of_worker in samples.items()}
        # Workers draw with the same seeds: the learner scores what they have in common once.
        different = {_ids(sequence): sequence for of_worker in sequences.values() for sequence in of_worker}
        scores = dict(zip(different, self._score(list(different.values())), strict=True))
        gaps = {}
        for worker, of_worker in sequences.items():
            learner = [scores[_ids(sequence)] for sequence in of_worker]
            sampler = [sequence.sampler_logprobs_T for sequence in of_worker]
            gaps[worker] = Mismatch.between(learner, sampler).abs_max
        return gaps


def _ids(sequence: TrainSequence) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return sequence.prompt_ids, sequence.response_ids


def _largest_gap(samples: Sequence[Sample], others: Sequence[Sample]) -> float:
    """max |d log p| of two answers to the same requests, up to the first token in which they differ; infinite when that
    is the first one of a response."""
    gaps = []
    for one, other in zip(samples, others, strict=True):
        pairs = enumerate(zip(one.response_ids, other.response_ids, strict=False))
        same = next((n for n, (a, b) in pairs if a != b), min(len(one.response_ids), len(other.response_ids)))
        gaps.append(np.abs(one.logprobs_T[:same] - other.logprobs_T[:same]).max() if same else np.inf)
    return float(np.max(gaps))

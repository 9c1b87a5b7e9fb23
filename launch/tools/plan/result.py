"""What a plan says, and what follows from it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from launch.tools.plan.layers import LayerRow
from launch.tools.plan.memory import EngineMemory, LearnerMemory

MARGIN = 0.05
"""Estimates are not accurate enough to judge speed-ups within this of 1."""


@dataclass(frozen=True)
class Times:
    """Estimated seconds of one training step."""

    decode_s: float
    """One engine step: a token for each of its sequences."""
    rollout_s: float
    learner_s: float
    publication_s: float

    @property
    def step_s(self) -> float:
        return self.rollout_s + self.learner_s + self.publication_s


@dataclass(frozen=True)
class Slowdown:
    """Seconds of layers that were timed on this machine, divided by the formulas'."""

    rollout: float
    learner: float


NOT_TIMED = Slowdown(1.0, 1.0)


@dataclass(frozen=True)
class Speeds:
    """What `qarl simulate` needs of a plan: estimates of the run's own format."""

    slots: int
    """Sequences that one engine decodes at once."""
    decode_s: Callable[[int], float]
    """An engine's step, by the sequences that it decodes."""
    prefill_s: float
    """An engine's reading of one prompt."""
    score_s: float
    """A rank's forward of one response token with its part of the prompt."""
    update_s: float
    """A rank's forward and backward of the same."""
    optimizer_s: float
    """An optimizer step of one rank alone."""
    publish_s: float
    """A publication to one engine, without the probe."""
    published_bytes: int
    gradient_bytes: int

    def slowed(self, by: Slowdown) -> "Speeds":
        """The same where everything takes so many times as long."""
        decode_s = self.decode_s
        return replace(
            self,
            decode_s=lambda batch: by.rollout * decode_s(batch),
            prefill_s=by.rollout * self.prefill_s,
            score_s=by.learner * self.score_s,
            update_s=by.learner * self.update_s,
            optimizer_s=by.learner * self.optimizer_s,
        )


@dataclass(frozen=True)
class Estimate:
    """One format in this run."""

    scheme: str
    fault: str
    weight_bytes: int
    published_bytes: int
    kv_tokens: int
    sequences: int
    """Of `rollout.max_model_len`, that the KV cache holds."""
    slots: int
    """Sequences that decode at once."""
    times: Times | None = None
    """None where `fault` says why it cannot run."""

    @property
    def tokens_per_s(self) -> float | None:
        """Of one engine, decoding."""
        return None if self.times is None else self.slots / self.times.decode_s


@dataclass(frozen=True)
class Plan:
    """All that `qarl plan` says: bytes and seconds, of one engine and one learner rank."""

    run: str
    model: str
    device: str
    device_source: str
    scheme: str
    numerics: str
    learner_kernel: str
    parameters: int
    active_parameters: int
    prompt_tokens: int
    response_tokens: int
    layers: list[LayerRow]
    learner: dict[int, LearnerMemory]
    """By ZeRO stage; without those that DeepSpeed refuses."""
    learner_budget: int
    zero_stage: int
    ranks: int
    engine: EngineMemory
    engine_budget: int
    estimates: list[Estimate]
    """Of every format, the run's own first."""
    slowdown: Slowdown
    """Of the run's own format; ones without `--measure`."""
    by_batch: dict[int, float]
    """Decode speed-up over full precision, by sequences of an engine."""
    by_response: dict[int, float]
    """Speed-up of a training step over full precision, by mean response length."""
    faults: list[str]
    """Why the run cannot work; empty when it can."""

    @property
    def own(self) -> Estimate:
        return self.estimates[0]

    @property
    def plain(self) -> Estimate:
        """Full precision."""
        return next(estimate for estimate in self.estimates if estimate.scheme == "none")

    def verdict(self) -> Iterator[str]:
        """Whether the run's format pays, and from which batch and response length on; no lines when it cannot run."""
        own, plain = self.own, self.plain
        if own.times is None:
            return
        if plain.times is None:
            yield f"Full precision is no alternative: {plain.fault}."
            return
        if own is plain:
            yield f"Rollouts are {plain.times.rollout_s / plain.times.step_s:.0%} of a step."
            return
        gain = plain.times.step_s / own.times.step_s
        judgement = "pays" if gain > 1 + MARGIN else "does not pay" if gain < 1 - MARGIN else "changes little"
        yield f"{own.scheme} {judgement}: a training step is {gain:.2f}x as fast as in full precision."
        before, now = (times.rollout_s / times.step_s for times in (plain.times, own.times))
        yield (
            f"Rollouts are {before:.0%} of a step in full precision and {now:.0%} in {own.scheme}; "
            f"if they cost nothing, a step would be {1 / (1 - before):.2f}x as fast."
        )
        yield f"Decoding is faster {_range(self.by_batch, 'sequences per engine')}."
        yield f"A step is faster {_range(self.by_response, 'response tokens')}."


def _range(gains: dict[int, float], unit: str) -> str:
    """Where a speed-up by ascending `unit` exceeds 1: "at any of 1 to 64", "up to 16", "from 64 on", "at none of"."""
    wins = [size for size, gain in gains.items() if gain > 1]
    first, last = min(gains), max(gains)
    if not wins:
        return f"at none of {first} to {last} {unit}"
    if len(wins) == len(gains):
        return f"at any of {first} to {last} {unit}"
    if wins[0] == first:
        return f"up to about {wins[-1]} {unit}"
    return f"from about {wins[0]} {unit} on"

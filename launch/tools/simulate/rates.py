"""How fast the parts of a simulated run are, and how long its responses."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import NormalDist, fmean, median

from launch.run.tracking import METRICS_FILE, SAMPLES_FILE, read_log
from launch.tools.plan.result import Speeds
from qarl.config.run import Config
from qarl.errors import ConfigError, DataError

QUANTILES = 1000
MOST_TOKENS = 512
"""Tokens of the longest simulated response: of longer ones a token stands for several, which makes no difference."""
FEW_SAMPLES = 100
"""Responses below which a run's sample tables are too few to draw lengths from."""
STAGES = ("sample", "prox", "unaligned", "update", "publish")


@dataclass(frozen=True)
class Rates:
    """Seconds of a simulated run's parts; `token` is one of the simulation, which may stand for several."""

    slots: int
    """Sequences that an engine decodes at once."""
    decode_s: Callable[[int], float]
    """An engine's step, by the sequences that run."""
    prefill_s: float
    """An engine's reading of one prompt."""
    score_s: float
    """Learner: a forward of one response token, on one rank."""
    unaligned_s: float
    """Learner: the same of the unaligned model, for `mismatch.unaligned_every`."""
    update_s: float
    """Learner: forward and backward of one response token, on one rank."""
    optimizer_s: float
    """Learner: an optimizer step that one rank does alone."""
    exchange_s: float
    """The ranks' sum of gradients, for each optimizer step."""
    publish_s: float
    """A publication without its probe, up to the last engine."""
    driver_s: float
    """All else that a response costs a step: its reward, and the driver's work between the stages. The driver does one
    thing after the other, so nothing hides this."""
    lengths: Sequence[int]
    """Tokens of responses, one as likely as the other."""
    informative: float = 1.0
    """Share of the groups whose rewards differ."""
    token: int = 1
    """Tokens that one of the simulation stands for."""


def rates_of(speeds: Speeds, config: Config, lengths: Sequence[int], network: float, informative: float) -> Rates:
    """Rates of a plan's speeds.

    Args:
        lengths: as in `Rates`, in tokens.
        network: bytes/s between machines; infinite on one machine. Weights spread over the engines as a tree, gradients
            go around the ranks as a ring.
    """
    token = math.ceil(config.rollout.sampling.max_new_tokens / MOST_TOKENS)
    workers, ranks = config.rollout.num_workers, config.learner.num_ranks
    return Rates(
        slots=min(speeds.slots, config.rollout.responses_at_once),
        decode_s=lambda batch: token * speeds.decode_s(batch),
        prefill_s=speeds.prefill_s,
        score_s=token * speeds.score_s,
        unaligned_s=token * speeds.score_s,
        update_s=token * speeds.update_s,
        optimizer_s=speeds.optimizer_s,
        exchange_s=2 * (ranks - 1) / ranks * speeds.gradient_bytes / network,
        publish_s=speeds.publish_s + math.ceil(math.log2(workers)) * speeds.published_bytes / network,
        driver_s=0.0,
        lengths=[max(1, round(length / token)) for length in lengths],
        informative=informative,
        token=token,
    )


def lognormal(mean: float, spread: float, longest: int) -> list[int]:
    """Quantiles of a lognormal distribution of lengths, cut at `longest`. `spread` is the standard deviation of their
    logarithm."""
    z = [NormalDist().inv_cdf((i + 0.5) / QUANTILES) for i in range(QUANTILES)]
    return [min(longest, max(1, round(mean * math.exp(spread * (x - spread / 2))))) for x in z]


@dataclass(frozen=True)
class Measured:
    """What a run in turn took, from its folder: medians over its steps but the first."""

    stages: dict[str, float]
    """Seconds of the stages of a step, as `stages_of`."""
    rest: float
    """Seconds of all else in a step."""
    lengths: Sequence[int]
    informative: float

    @classmethod
    def of(cls, folder: Path, config: Config) -> "Measured":
        """Raises ConfigError or DataError: the run has too few steps, or sampled ahead."""
        rows = [row for row in read_log(folder / METRICS_FILE) if "timing_s/step" in row][1:]
        if config.train.max_staleness:
            raise ConfigError("sampled while it learned: what a part takes alone is not known", str(folder), IN_TURN)
        if len(rows) < 3:
            what = f"has {len(rows)} whole steps after the first, 3 are needed"
            raise DataError(what, str(folder / METRICS_FILE), "make a run of at least 4 steps")

        informative = fmean(float(row["reward/informative_groups"]) for row in rows if "reward/mean" in row)
        rest = median(row["timing_s/step"] - sum(row.get(f"timing_s/{name}", 0.0) for name in STAGES) for row in rows)
        return cls(stages_of(rows), rest, _lengths(folder, config, rows), informative)


def stages_of(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Median seconds of each stage of a step, over the steps that have it."""
    found = {name: [float(row[key]) for row in rows if (key := f"timing_s/{name}") in row] for name in STAGES}
    return {name: median(seconds) for name, seconds in found.items() if seconds}


IN_TURN = "calibrate with a run of train.max_staleness=0"


def _lengths(folder: Path, config: Config, rows: Sequence[dict[str, float]]) -> list[int]:
    """Lengths of a run's responses: those of its sample tables, or, where these are few, a lognormal distribution with
    the steps' mean and longest."""
    found = [len(row["token_ids"]) for row in read_log(folder / SAMPLES_FILE) if "token_ids" in row]
    if len(found) >= FEW_SAMPLES:
        return sorted(found)
    mean = fmean(float(row["response_length/mean"]) for row in rows if "response_length/mean" in row)
    most = fmean(float(row["response_length/max"]) for row in rows if "response_length/max" in row)
    # E max of n is near the quantile 1 - 1/n: ln(most / mean) = spread z - spread^2 / 2.
    z = NormalDist().inv_cdf(1 - 1 / (config.train.prompts_per_step * config.train.group_size))
    spread = z - math.sqrt(max(0.0, z**2 - 2 * math.log(most / mean)))
    return lognormal(mean, spread, config.rollout.sampling.max_new_tokens)


def calibrated(
    rates: Rates, before: Rates, measured: Measured, simulated: Mapping[str, float], responses: int
) -> Rates:
    """`rates` with what a run has shown.

    Args:
        before: the rates of a simulation of that run, which took `simulated` for its stages.
        responses: of a step of that run.
    """
    factor = {name: seconds / simulated[name] for name, seconds in measured.stages.items() if simulated.get(name)}
    sample, update = factor.get("sample", 1.0), factor.get("update", 1.0)
    prox = factor.get("prox", update)
    probe = sample * (simulated["publish"] - before.publish_s)
    publish = measured.stages["publish"] - probe - before.publish_s
    decode_s = rates.decode_s
    return replace(
        rates,
        decode_s=lambda batch: sample * decode_s(batch),
        prefill_s=sample * rates.prefill_s,
        score_s=prox * rates.score_s,
        unaligned_s=factor.get("unaligned", prox) * rates.unaligned_s,
        update_s=update * rates.update_s,
        optimizer_s=update * rates.optimizer_s,
        publish_s=max(0.0, rates.publish_s + publish),
        driver_s=max(0.0, measured.rest) / responses,
    )

"""The batch of one step, as pure functions: from scored groups to records, and from records to minibatches."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from random import Random
from statistics import fmean
from typing import Any

import numpy as np
import numpy.typing as npt

from qarl.advantages import advantages, has_variance
from qarl.config.error_tokens import ErrorTokensConfig
from qarl.config.run import Config
from qarl.error_tokens import ErrorTokens, find_error_tokens
from qarl.mismatch import Logprobs, Mismatch
from qarl.protocols import Cell, Row
from qarl.types import Sample, Score, TrainSequence
from trainer.collect import Group


@dataclass(frozen=True)
class Record:
    """One response on its way through a step."""

    sample: Sample
    score: Score
    sequence: TrainSequence
    group: int
    """Index of its group: the responses to one prompt."""
    used: bool
    """Whether the update may learn from its group."""


def build(groups: Sequence[Group], config: Config) -> list[Record]:
    """One record for each response, group by group, with its advantage."""
    rewards_PG = [group.rewards for group in groups]
    advantages_PG = advantages(rewards_PG, config.advantage, [group.prompt_id for group in groups])
    return [
        Record(
            sample,
            score,
            TrainSequence.of(sample, advantage, id=f"{group.prompt_id}#{number}"),
            group=index,
            used=has_variance(rewards_PG[index]) or not config.advantage.drop_zero_variance,
        )
        for index, group in enumerate(groups)
        for number, (sample, score, advantage) in enumerate(
            zip(group.samples, group.scores, advantages_PG[index], strict=True)
        )
    ]


def with_prox(records: Sequence[Record], prox: Sequence[Logprobs]) -> list[Record]:
    """The records with `prox[i]` as log pi_prox of record i."""
    return [
        replace(record, sequence=replace(record.sequence, prox_logprobs_T=prox_T))
        for record, prox_T in zip(records, prox, strict=True)
    ]


def at_sampled(records: Sequence[Record], values: Sequence[Logprobs], version: int | None = None) -> list[Logprobs]:
    """Of the response tokens of record i, whose values are `values[i]`, those that were sampled, by weights `version`
    where it is given."""
    return [record.sequence.at_sampled(values_T, version) for record, values_T in zip(records, values, strict=True)]


def compared(
    records: Sequence[Record], prox: Sequence[Logprobs], version: int, keep_kv: bool
) -> tuple[list[Logprobs], list[Logprobs]]:
    """What learner, which has weights `version`, and sampler give the tokens that these weights sampled.

    With `keep_kv` (`rollout.keep_kv`) responses of several versions are left out: their later tokens were sampled from
    keys and values of older weights, which the learner does not have.
    """
    pairs = [
        (
            record.sequence.at_sampled(prox_T, version),
            record.sequence.at_sampled(record.sequence.sampler_logprobs_T, version),
        )
        for record, prox_T in zip(records, prox, strict=True)
        if not (keep_kv and len(record.sample.versions) > 1)
    ]
    return [ours for ours, _ in pairs], [theirs for _, theirs in pairs]


def kept_kv_metrics(records: Sequence[Record], prox: Sequence[Logprobs], version: int) -> dict[str, float]:
    """How many responses went on with keys and values of older weights, and how far the sampler's log-probs of their
    tokens of weights `version` are from the learner's."""
    kept = [(r, prox_T) for r, prox_T in zip(records, prox, strict=True) if len(r.sample.versions) > 1]
    ours, theirs = compared([r for r, _ in kept], [prox_T for _, prox_T in kept], version, keep_kv=False)
    metrics = {"staleness/kept_kv": float(len(kept))}
    return metrics | (Mismatch.between(ours, theirs).metrics("mismatch/kept_kv_") if any(map(len, ours)) else {})


def aligned_logprobs(record: Record, step: int) -> Logprobs:
    """What the policy before the update of `step` gives the record's tokens: by the sampler if it had these weights,
    else by the learner."""
    sequence, prox_T = record.sequence, record.sequence.prox_logprobs_T
    return sequence.sampler_logprobs_T if prox_T is None or record.sample.versions == [step - 1] else prox_T


def staleness_metrics(records: Sequence[Record], prox: Sequence[Logprobs], step: int) -> dict[str, float]:
    """How far the policies that sampled are from pi_prox, the policy before the update of `step`. A response is as old
    as its oldest segment, which `train.max_staleness` bounds."""
    ages = [step - 1 - record.sample.versions[0] for record in records]
    segments = [len(record.sample.versions) for record in records]
    sampler = [record.sequence.sampler_logprobs_T for record in records]
    between = Mismatch.between(at_sampled(records, prox), at_sampled(records, sampler))
    return {
        "staleness/age_mean": fmean(ages),
        "staleness/age_max": float(max(ages)),
        "staleness/k1_kl": between.k1,
        "staleness/k3_kl": between.k3,
        "staleness/ess": between.ess,
        "staleness/continued": float(sum(count > 1 for count in segments)),
        "staleness/segments": float(sum(segments)),
    }


def error_tokens_of(records: Sequence[Record], config: ErrorTokensConfig) -> list[ErrorTokens]:
    """The error tokens among the sampled tokens of each record, found with its log pi_prox."""
    found = []
    for record in records:
        sequence = record.sequence
        assert sequence.prox_logprobs_T is not None
        ids_T, prox_T = map(sequence.at_sampled, (np.array(sequence.response_ids), sequence.prox_logprobs_T))
        found.append(find_error_tokens(ids_T.tolist(), record.sample.text, prox_T, config))
    return found


def without_error_tokens(records: Sequence[Record], found: Sequence[ErrorTokens]) -> list[Record]:
    """The records with a loss mask that leaves out the tokens of `found[i]` in record i."""
    masked = []
    for record, tokens in zip(records, found, strict=True):
        mask_T = record.sequence.counted_T
        mask_T[mask_T] = ~tokens.any_T
        masked.append(replace(record, sequence=replace(record.sequence, loss_mask_T=mask_T)))
    return masked


def table_row(
    record: Record, found: ErrorTokens | None, step: int, config: Config, after_T: Logprobs | None = None
) -> Row:
    """A response as a row of a table of `step`. Its record has log pi_prox.

    `mismatch` is max |log pi_prox - log pi_samp| (nats) of the tokens that `compared` compares; `staleness`, with
    `train.max_staleness`, is that of all others. `ratio` is exp(mean(log pi_theta - log pi_prox)), where `after_T` is
    log pi_theta after the update. `token_...` have a value for each response token: id, log pi_samp, the ratio, and 1
    for an error token.
    """
    sample, score, sequence = record.sample, record.score, record.sequence
    prox_T = sequence.prox_logprobs_T
    assert prox_T is not None
    own, others = _largest_gaps(record, prox_T, step - 1, config.rollout.keep_kv)
    tokens: dict[str, Cell] = {"token_ids": list(sample.response_ids), "token_logprobs": _short(sample.logprobs_T)}
    ratio: dict[str, float] = {}
    if after_T is not None:
        log_r_T = (after_T - prox_T).astype(np.float64)
        ratio["ratio"] = float(np.exp(sequence.at_sampled(log_r_T).mean())) if sample.num_sampled else math.nan
        tokens["token_ratios"] = _short(np.exp(log_r_T))
    if found is not None:
        flags_T = np.zeros(len(sample.response_ids), np.int8)
        flags_T[slice(None) if sample.sampled_T is None else sample.sampled_T] = found.any_T
        tokens["token_errors"] = flags_T.tolist()
    return {
        "prompt": sample.prompt.text,
        "response": sample.text,
        "answer": sample.prompt.answer,
        "reward": score.reward,
        **{f"reward/{name}": value for name, value in score.components.items() if len(score.components) > 1},
        "advantage": sequence.advantage,
        **ratio,
        "mismatch": own,
        **({"staleness": others} if config.train.max_staleness else {}),
        "finish_reason": sample.finish_reason,
        "version": sample.version,
        "mean_logprob": float(sample.logprobs_T.sum() / sample.num_sampled) if sample.num_sampled else math.nan,
        **(found.columns() if found else {}),
        **tokens,
    }


def _largest_gaps(record: Record, prox_T: Logprobs, version: int, keep_kv: bool) -> tuple[float, float]:
    """Max |log pi_prox - log pi_samp| of the tokens that `compared` compares, and of the other sampled ones; NaN where
    there is none."""
    gap_T = np.abs(prox_T - record.sample.logprobs_T)
    at_T = np.arange(len(gap_T))
    is_mixed = keep_kv and len(record.sample.versions) > 1
    own = at_T[:0] if is_mixed else record.sequence.at_sampled(at_T, version)
    others = np.setdiff1d(record.sequence.at_sampled(at_T), own)
    largest_own, largest_other = (float(gap_T[chosen].max()) if len(chosen) else math.nan for chosen in (own, others))
    return largest_own, largest_other


def _short(values_T: npt.NDArray[Any]) -> list[float]:
    """The values with four digits, which is what a table shows."""
    return [float(f"{value:.4g}") for value in values_T]


def split(records: Sequence[Record], count: int, seed: int) -> list[list[TrainSequence]]:
    """At most `count` minibatches of nearly equal numbers of groups, none empty.

    Groups that are not used, and responses that are masked as a whole, are left out. A group stays within one
    minibatch. `seed` orders the groups: the pool draws unseen prompts first, and every minibatch should have some.
    """
    groups: dict[int, list[TrainSequence]] = {record.group: [] for record in records if record.used}
    for record in records:
        if record.used and not fully_masked(record.sequence):
            groups[record.group].append(record.sequence)
    order = list(groups)
    Random(seed).shuffle(order)
    minibatches = [[sequence for group in part for sequence in groups[group]] for part in evenly(order, count)]
    return [minibatch for minibatch in minibatches if minibatch]


def fully_masked(sequence: TrainSequence) -> bool:
    """Whether the mask leaves no token of the response. An empty response is not masked: the objective refuses it."""
    return bool(sequence.response_ids) and sequence.loss_tokens == 0


def evenly(items: Sequence[int], count: int) -> list[list[int]]:
    """`items` in at most `count` consecutive runs of nearly equal length, none empty."""
    count = min(count, len(items))
    bounds = [len(items) * i // count for i in range(count + 1)] if items else []
    return [list(items[a:b]) for a, b in pairwise(bounds)]

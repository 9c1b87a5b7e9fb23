"""Scored responses as the tables of a run show them."""

from __future__ import annotations

from dataclasses import replace

from qarl.protocols import Row
from qarl.types import Sample, Score, TrainSequence
from tests.support.runs import make_config
from trainer.step import Record, table_row


def record_of(sample: Sample, score: Score, advantage: float = 0.0) -> Record:
    """The record of a response of which the learner computes what the sampler did."""
    sequence = replace(TrainSequence.of(sample, advantage), prox_logprobs_T=sample.logprobs_T)
    return Record(sample, score, sequence, group=0, used=True)


def row_of(sample: Sample, score: Score) -> Row:
    return table_row(record_of(sample, score), None, sample.version + 1, make_config())

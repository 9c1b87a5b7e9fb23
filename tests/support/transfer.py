"""A fleet and a learner that publishes to it, as tests of transports drive them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from qarl.types import Prompt, Sample, SampleRequest, TrainSequence
from rollout.fleet import RayFleet
from tests.support.fakes import FakeProver
from trainer.ranks import LearnerGroup

REQUESTS = [SampleRequest(Prompt(str(i), "", "", (1, 4 + i)), i, 1.0, 12) for i in range(6)]


@dataclass
class Run:
    fleet: RayFleet
    learner: LearnerGroup
    damage: Path
    notes: list[str]

    def publish(self, version: int) -> list[Sample]:
        """A publication, and what every worker then samples."""
        weights = self.learner.publish(version)
        prover = FakeProver(REQUESTS)
        self.fleet.load(weights, prover)
        ((_, judged),) = prover.judged
        return [sample for samples in judged.values() for sample in samples]

    def learn(self, samples: list[Sample]) -> None:
        batch = [TrainSequence.of(sample, (-1.0) ** i) for i, sample in enumerate(samples)]
        self.learner.update([[replace(s, prox_logprobs_T=s.sampler_logprobs_T) for s in batch]])

    def gaps(self, samples: list[Sample], version: int) -> list[float]:
        """max |d log p| of each sample, which must be of `version`."""
        assert [s.version for s in samples] == [version] * len(samples)
        scored = self.learner.score([TrainSequence.of(sample) for sample in samples])
        return [float(np.abs(row - s.logprobs_T).max()) for row, s in zip(scored, samples, strict=True)]

    def check(self, samples: list[Sample], version: int) -> None:
        """The engines sampled from the learner's weights: every log-prob is equal."""
        assert set(self.gaps(samples, version)) == {0.0}

"""The other partners of the training loop in virtual time: learner, rewards, tracker."""

from collections import Counter
from collections.abc import Mapping, Sequence
from random import Random

import numpy as np
import numpy.typing as npt

from launch.tools.simulate.rates import Rates
from launch.tools.simulate.world import World
from qarl.metrics import Value
from qarl.protocols import Tracker, UpdateResult
from qarl.quant.scheme import QuantScheme
from qarl.types import Prompt, Sample, Score, TrainSequence
from qarl.weights.source import Manifest, PublishedWeights


class SimulatedLearner:
    """A `Learner` whose ranks share the tokens. It counts how old what it learns from is.

    Args:
        processors: that it needs while it computes.
    """

    def __init__(self, world: World, rates: Rates, ranks: int, processors: float) -> None:
        self._world, self._rates, self._ranks, self._processors = world, rates, ranks, processors
        self._step = 0
        self.ages: list[Counter[int]] = []
        """For each step with an update, how many of its sequences have which age, in versions."""

    def score(
        self, sequences: Sequence[TrainSequence], aligned: bool = True, version: int | None = None
    ) -> list[npt.NDArray[np.float32]]:
        self._compute(self._tokens(sequences) * (self._rates.score_s if aligned else self._rates.unaligned_s))
        return [sequence.sampler_logprobs_T for sequence in sequences]

    def update(self, minibatches: Sequence[Sequence[TrainSequence]]) -> UpdateResult:
        rates = self._rates
        each_s = rates.optimizer_s / self._ranks + rates.exchange_s
        self._compute(sum(self._tokens(part) * rates.update_s + each_s for part in minibatches))
        self.ages.append(Counter(self._step - _oldest(sequence) for part in minibatches for sequence in part))
        return UpdateResult({}, 0.0)

    def publish(self, version: int) -> PublishedWeights:
        """At no cost: the fleet counts the whole of a publication."""
        return PublishedWeights(Manifest(version, "", (), ""), ())

    def at_step(self, step: int) -> None:
        """`step` is done."""
        self._step = step

    def switch(self, scheme: QuantScheme) -> bool:
        raise NotImplementedError("a schedule of schemes")

    def save(self, directory: str) -> None: ...

    def load(self, directory: str) -> None: ...

    def export(self, directory: str, quantized: bool) -> None: ...

    def close(self) -> None: ...

    def _tokens(self, sequences: Sequence[TrainSequence]) -> float:
        """Of the fullest rank: its part of all tokens, or the longest response."""
        lengths = [sequence.forward_tokens for sequence in sequences]
        return max(sum(lengths) / self._ranks, max(lengths))

    def _compute(self, work_s: float) -> None:
        self._world.spend(work_s, self._processors)


def _oldest(sequence: TrainSequence) -> int:
    """The first weight version that sampled a token of it."""
    return sequence.version if sequence.versions_T is None else int(sequence.versions_T[0])


class SimulatedRewards:
    """A `RewardService`: half of the responses to an informative prompt are right, and all to any other. What they cost
    is in `Rates.driver_s`."""

    def __init__(self, rates: Rates) -> None:
        self._rates, self._random = rates, Random(0)

    def score(self, samples: Sequence[Sample]) -> list[Score]:
        return [Score(float(not self._differs(sample.prompt) or self._random.random() < 0.5)) for sample in samples]

    def _differs(self, prompt: Prompt) -> bool:
        return Random(prompt.id).random() < self._rates.informative

    def check(self, prompts: Sequence[Prompt]) -> None: ...

    def close(self) -> None: ...


class StepTracker(Tracker):
    """Keeps the metrics of each step, and lets the driver's own work take its time.

    Args:
        driver_s: seconds of it in a step, spent before the update.
    """

    def __init__(self, world: World, learner: SimulatedLearner, driver_s: float) -> None:
        self._world, self._learner, self._driver_s = world, learner, driver_s
        self.steps: list[dict[str, float]] = []

    def phase(self, name: str) -> None:
        if name == "update":
            self._world.spend(self._driver_s, processors=1.0)

    def log(self, step: int, metrics: Mapping[str, Value]) -> None:
        if "timing_s/step" in metrics:
            self._learner.at_step(step)
            self.steps.append({name: value for name, value in metrics.items() if isinstance(value, float)})

"""What the training loop asks of its partners. Whoever consumes rollouts does not know where they were made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from qarl.metrics import Value
from qarl.quant.scheme import QuantScheme
from qarl.types import AugmentOutcome, GroupResult, Prompt, Sample, SampleRequest, Score, TrainSequence, WorkerInfo
from qarl.weights.source import Channel, TransferStep, WeightSource


class Engine(Protocol):
    """An inference engine that holds one weight version."""

    @property
    def version(self) -> int:
        """Version of the weights that it holds; -1 before the first load."""
        ...

    def generate(self, requests: Sequence[SampleRequest]) -> list[Sample]:
        """One sample per request, in order."""
        ...

    def connect(self, channel: Channel) -> None:
        """Connect to the learner, which waits for all engines."""
        ...

    def receive(self, step: TransferStep) -> None:
        """Take one step of a transfer from the learner. The tensors wait for the next `load`."""
        ...

    def load(self, weights: WeightSource) -> None:
        """Take over `weights`, all or nothing, and prove it.

        Raises PublicationError when they are not what their manifest says, or the engine does not hold what they are;
        it then holds the version of before.
        """
        ...

    def info(self) -> WorkerInfo: ...


class Fleet(Protocol):
    """All rollout workers."""

    replacements: int
    """Workers replaced so far. A new one holds the current weights, unproven until the next `load`."""

    def sample(self, requests: Sequence[SampleRequest]) -> list[Sample]:
        """One sample per request, in order; a worker that dies is replaced and its requests are made again."""
        ...

    def load(self, weights: WeightSource, probe: Sequence[SampleRequest]) -> list[list[Sample]]:
        """Give every worker `weights`; returns each worker's samples of `probe` under them."""
        ...

    def switch(self, scheme: QuantScheme) -> None:
        """Replace every engine by one in `scheme`, still without weights."""
        ...

    def close(self) -> None: ...


class Learner(Protocol):
    """The policy being trained."""

    def score(self, sequences: Sequence[TrainSequence], aligned: bool = True) -> list[npt.NDArray[np.float32]]:
        """Log-probs (nats) of each sequence's response tokens, without gradient.

        `aligned=False` scores with plain transformers in the model dtype instead: the gap that alignment removes.
        """
        ...

    def update(
        self, minibatches: Sequence[Sequence[TrainSequence]], prox_T: Sequence[Sequence[npt.NDArray[np.float32]]]
    ) -> dict[str, Value]:
        """One optimizer step per minibatch; `prox_T` are log pi_prox in the same nesting. Returns metrics."""
        ...

    def publish(self, version: int) -> WeightSource: ...

    def switch(self, scheme: QuantScheme) -> bool:
        """Compute in `scheme` from now on; True when this host then computes what the engine computes."""
        ...

    def save(self, directory: str) -> None: ...

    def load(self, directory: str) -> None: ...

    def export(self, directory: str, quantized: bool) -> None:
        """Write a Hugging Face checkpoint; with `quantized`, a compressed-tensors one that vLLM loads."""
        ...

    def close(self) -> None: ...


class RewardService(Protocol):
    """Verifiers behind a time-out."""

    def score(self, samples: Sequence[Sample]) -> list[Score]:
        """One score per sample, in order. Never raises for a sample: a failure is a zero reward with its reason."""
        ...

    def close(self) -> None: ...


class PromptPool(Protocol):
    """Which prompts the next step spends its rollouts on."""

    def draw(self, n: int, step: int) -> list[Prompt]:
        """Up to `n` distinct prompts, now in flight."""
        ...

    def observe(self, results: Sequence[GroupResult], step: int) -> None:
        """Record group results by prompt id. Late, duplicate and unknown results change nothing."""
        ...

    def abort(self, prompt_ids: Sequence[str]) -> None:
        """Give drawn prompts back unobserved."""
        ...

    def spread(self, prompt_id: str) -> float:
        """Standard deviation expected of a reward of this prompt, which is in the pool."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...

    def metrics(self) -> dict[str, float]: ...


class Tracker(Protocol):
    """Where metrics go."""

    def log(self, step: int, metrics: Mapping[str, Value]) -> None: ...

    def table(
        self,
        step: int,
        samples: Sequence[Sample],
        scores: Sequence[Score],
        name: str = "samples",
        more: Sequence[Mapping[str, float | str]] = (),
    ) -> None: ...

    def augmented(self, step: int, outcomes: Sequence[AugmentOutcome]) -> None:
        """What became of problems that the policy made."""
        ...

    def note(self, line: str) -> None:
        """One line for the reader of the terminal."""
        ...

    def close(self) -> None: ...

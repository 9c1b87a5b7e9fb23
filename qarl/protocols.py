"""What the training loop needs from its partners. A consumer of rollouts does not know where they were sampled."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from qarl.metrics import Value
from qarl.quant.scheme import QuantScheme
from qarl.types import AugmentOutcome, EnvironmentTurn, Prompt, Sample, SampleRequest, Score, TrainSequence, WorkerInfo
from qarl.weights.source import Channel, TransferStep, WeightSource


class Engine(Protocol):
    """An inference engine that holds one weight version."""

    @property
    def version(self) -> int:
        """Version of the weights that the engine holds; -1 before the first load."""
        ...

    def add(self, requests: Mapping[int, SampleRequest]) -> None:
        """Queue requests, all or none, under numbers that no running request has."""
        ...

    def step(self) -> dict[int, Sample]:
        """Sample the next token of every request; returns the samples that are finished then, by number."""
        ...

    def abort(self, numbers: Iterable[int]) -> None:
        """Forget those requests that still run."""
        ...

    def connect(self, channel: Channel) -> None:
        """Connect to the learner, which waits for all engines."""
        ...

    def receive(self, step: TransferStep) -> None:
        """Take one step of a transfer from the learner. The tensors wait for the next `load`."""
        ...

    def load(self, weights: WeightSource) -> None:
        """Load `weights`, all or nothing, and check that the engine holds them.

        Only partial requests may be running. They go on under the new weights: the engine prefills prompt and response
        so far again, as one prompt, but with `rollout.keep_kv`. Raises PublicationError when the weights differ from
        their manifest, or the engine does not hold them after the load; it then holds the previous version.
        """
        ...

    def sleep(self) -> None:
        """Give GPU memory back until `wake`; keeps the weights. No request may be running."""
        ...

    def wake(self) -> None:
        """Take the memory again, before anything is sampled or loaded; does nothing to an engine that is awake."""
        ...

    def info(self) -> WorkerInfo: ...


class Prover(Protocol):
    """Checks that a worker computes what was published: the worker samples a few prompts, the learner scores them."""

    def requests(self, version: int) -> list[SampleRequest]:
        """What a worker samples right after it has loaded weights of `version`."""
        ...

    def judge(self, samples: Mapping[int, Sequence[Sample]], version: int) -> dict[int, float]:
        """Score the samples of `requests`, given by worker number; returns each worker's max |d log p| (nats).

        The learner must still have the weights of `version`. Raises PublicationError when a worker's is too large.
        """
        ...


class Fleet(Protocol):
    """All rollout workers. A worker that dies is replaced, and its requests are sampled again with equal results."""

    def submit(self, groups: Sequence[Sequence[SampleRequest]]) -> list[int]:
        """Ask for a sample per request; each group goes to one worker as a whole. Returns a number for each group."""
        ...

    def poll(self, timeout_s: float) -> dict[int, list[Sample]]:
        """Groups that have finished since the last call, by number, with one sample per request, in order.

        Waits at most `timeout_s` for the first one.
        """
        ...

    def queued(self) -> set[int]:
        """Groups of `submit` that no worker has yet."""
        ...

    def abort(self, numbers: Sequence[int]) -> None:
        """Forget these groups of `submit`: `poll` does not return them."""
        ...

    def sample(self, requests: Sequence[SampleRequest]) -> list[Sample]:
        """One sample per request, in order. They are sampled before all groups that wait."""
        ...

    def busy_s(self) -> float:
        """Seconds so far in which workers had groups, averaged over them."""
        ...

    def load(self, weights: WeightSource, prover: Prover | None = None) -> dict[int, float]:
        """Give every worker `weights`, and let `prover` judge all workers; returns what `prover` returns.

        Groups that workers have begun are finished first, but partial ones go on under the new weights; those that
        still wait are sampled from the new weights.
        A worker that replaces another one later gets the same weights, and `prover` judges it before it samples.
        """
        ...

    def sleep(self) -> None:
        """Have every engine give its GPU memory back, until `wake`. No group may be unfinished."""
        ...

    def wake(self) -> None:
        """Have every engine take its memory again, with the weights that it had. Those that are awake stay so."""
        ...

    def switch(self, scheme: QuantScheme) -> None:
        """Replace every engine by one in `scheme`, which has no weights yet."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class UpdateResult:
    """What an update reports.

    `first_minibatch_ratio_dev` is max |r_seq - 1| over the first minibatch, where r_seq = exp(mean over the response of
    log pi_theta - log pi_prox). No optimizer step has happened yet, so it is 0 exactly when pi_prox is what the learner
    computes. The learner measures it from log-probs, whatever the objective.
    """

    metrics: Mapping[str, Value]
    first_minibatch_ratio_dev: float

    def all_metrics(self) -> dict[str, Value]:
        return {**self.metrics, "actor/seq_ratio_max_dev_first_minibatch": self.first_minibatch_ratio_dev}


class Learner(Protocol):
    """The policy being trained."""

    def score(
        self, sequences: Sequence[TrainSequence], aligned: bool = True, version: int | None = None
    ) -> list[npt.NDArray[np.float32]]:
        """Log-probs (nats) of each sequence's response tokens, without gradient.

        `aligned=False` scores with plain transformers in the model dtype: it shows the gap that alignment removes.
        `version` scores with the weights that were published as it; with `mismatch.stale_share` the learner keeps them.
        """
        ...

    def update(self, minibatches: Sequence[Sequence[TrainSequence]]) -> UpdateResult:
        """One optimizer step per minibatch. Raises ObjectiveError when a sequence has no `prox_logprobs_T`."""
        ...

    def publish(self, version: int) -> WeightSource: ...

    def switch(self, scheme: QuantScheme) -> bool:
        """Compute in `scheme` from now on; returns whether this host then computes what the engine computes."""
        ...

    def save(self, directory: str) -> None: ...

    def load(self, directory: str) -> None: ...

    def export(self, directory: str, quantized: bool) -> None:
        """Write a Hugging Face checkpoint; with `quantized`, a compressed-tensors one that vLLM loads."""
        ...

    def close(self) -> None: ...


class Environments(Protocol):
    """What answers the policy between its turns: one environment for each conversation."""

    def reset(self, prompts: Mapping[int, Prompt]) -> dict[int, EnvironmentTurn]:
        """Begin one conversation for each prompt, under a number that no other one has.

        What an environment gives here replaces the prompt. A failure raises nothing: it is in the turn's `error`.
        """
        ...

    def step(self, responses: Mapping[int, str]) -> dict[int, EnvironmentTurn]:
        """What follows on a response, by number of the conversation."""
        ...

    def end(self, numbers: Iterable[int]) -> None:
        """These conversations are over."""
        ...

    def close(self) -> None: ...


class RewardService(Protocol):
    """Verifiers with a time-out."""

    def score(self, samples: Sequence[Sample]) -> list[Score]:
        """One score per sample, in order. A failure on a sample raises nothing: it is a reward of 0 with its reason."""
        ...

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raises DataError: no response to one of these prompts could be judged; ConfigError: nothing can judge."""
        ...

    def close(self) -> None: ...


Cell = float | str | Sequence[float] | Sequence[str]
Row = Mapping[str, Cell]
"""A response in a table, by column. A column with a sequence has a value for each of its tokens."""


class Tracker:
    """Where metrics go. Each method does nothing unless a tracker defines it."""

    def log(self, step: int, metrics: Mapping[str, Value]) -> None:
        """The metrics of `step`; several calls a step add up."""

    def table(self, step: int, name: str, rows: Sequence[Row]) -> None:
        """Whole responses with their rewards (`samples`), or with what is wrong in them (`error_tokens`)."""

    def augmented(self, step: int, outcomes: Sequence[AugmentOutcome]) -> None:
        """What became of the problems that the policy wrote."""

    def note(self, line: str) -> None:
        """Log one line of text, the same that the terminal shows."""

    def alert(self, title: str, text: str) -> None:
        """Something a person should look at; the terminal shows `text`."""

    def phase(self, name: str) -> None:
        """What the run does from now on: a phase of a step, as in `timing_s/...`, or "evaluate", "checkpoint", ..."""

    def exported(self, files: Mapping[str, Path]) -> None:
        """Folders of the models that the run has written, by name."""

    def stopped(self, reason: str) -> None:
        """The run ends with an error, or is interrupted: `reason` is then `INTERRUPTED`. `close` follows."""

    def close(self) -> None:
        """The run has ended, well or not."""

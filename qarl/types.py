"""Values that travel through one step. All are plain, picklable and free of torch and ray.

Suffixes: _T response tokens of one sequence.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal, NamedTuple, Self, TypeVar

import numpy as np
import numpy.typing as npt

Mask = npt.NDArray[np.bool_]
Versions = npt.NDArray[np.int64]
Scalar = TypeVar("Scalar", bound=np.generic)


@dataclass(frozen=True)
class Prompt:
    """One problem.

    `id` is unique and stable across runs; `answer` is the reference, what the verifier compares with; `other_answers`
    are right as well; `level` is a label for reports (0 when the data has none); `token_ids` are the prompt's tokens,
    special tokens included; `source` says which data the row is of (its `data_source`, "" when the data has none), by
    which rewards are chosen; `metadata` are the row's other fields, as JSON has them, which a reward may read;
    `verifier_kwargs` are what the verifier of this row takes besides the answer; `heldout_set` names the held-out set,
    "" for training prompts and where there is one set.
    """

    id: str
    text: str
    answer: str
    token_ids: tuple[int, ...]
    level: int = 0
    verifier_kwargs: Mapping[str, Any] = field(default_factory=dict, compare=False)
    source: str = ""
    other_answers: tuple[str, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict, compare=False)
    heldout_set: str = ""

    @property
    def answers(self) -> tuple[str, ...]:
        """Every right answer, `answer` first."""
        return (self.answer, *self.other_answers)


@dataclass(frozen=True)
class SampleRequest:
    """Ask for one response. Equal `seed` and weights give equal tokens, on whichever worker runs it.

    `ignore_eos`: go on after the end token, to `max_new_tokens`. `stop` and `stop_token_ids` end the response besides
    the end token. `reuse_cache`: take keys and values of the prompt's beginning from the engine's prefix cache where it
    has them; False computes the whole prompt. `partial`: the response may go on under newer weights. `top_p`, `top_k`
    and `min_p` leave unlikely tokens out, as vLLM does, for evaluations alone: a learner would not know them.
    """

    prompt: Prompt
    seed: int
    temperature: float
    max_new_tokens: int
    ignore_eos: bool = False
    reuse_cache: bool = True
    partial: bool = False
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0


@dataclass(frozen=True)
class Score:
    """What a response is worth: `reward` is the weighted sum of its components, and trains the policy; `success` in
    [0, 1] says how right it is; None takes the reward for it. When a component failed, `error` says why, and its reward
    is 0. `components` are the rewards of all components by name, nan where one does not judge the row.
    """

    reward: float
    error: str = ""
    success: float | None = field(default=None, compare=False)
    components: Mapping[str, float] = field(default_factory=dict, compare=False)

    @property
    def solved(self) -> float:
        """How right the response is, in [0, 1]."""
        return self.reward if self.success is None else self.success


@dataclass(frozen=True)
class EnvironmentTurn:
    """What an environment answers to a response, or, before the first one, to a prompt.

    `given` is what the policy reads next: a text, messages with `role` and `content`, or token ids; before the first
    response also a mapping with `messages` and `tools`; None for nothing. `reward` is this turn's part of the
    conversation's reward. `error` says why the environment failed, which ends the conversation with reward 0.
    """

    given: str | list[Any] | dict[str, Any] | None = None
    reward: float = 0.0
    done: bool = False
    error: str = ""


@dataclass(frozen=True)
class Sample:
    """One response, with the sampler's log-probs. With an environment it is all of a conversation after the prompt.

    `logprobs_T[t]` is log pi_samp of `response_ids[t]` (nats, float32), 0 where the environment gave the token;
    `version` is the weight version that sampled it; `finish_reason` is "length" or "stop": the last of `response_ids`
    is then the end token, a stop id, or the token that completed a stop string, and `text` ends before it. `sampled_T`
    is False at given tokens; None: all were sampled. `score` is the environment's; None without one: a verifier judges.

    With `rollout.partial` a response may go on under newer weights. `versions_T` has then the version that sampled each
    token, and `version` the last one's; None: all are of `version`. The tokens of one version are a segment.

    Example: three tokens of version 4 and two of 5 have `versions_T` [4, 4, 4, 5, 5], `versions` [4, 5], `version` 5.
    """

    prompt: Prompt
    response_ids: tuple[int, ...]
    logprobs_T: npt.NDArray[np.float32]
    text: str
    finish_reason: str
    version: int
    worker: int = 0
    sampled_T: Mask | None = None
    score: Score | None = None
    versions_T: Versions | None = None

    @property
    def num_sampled(self) -> int:
        """Response tokens that the policy sampled."""
        return len(self.response_ids) if self.sampled_T is None else int(self.sampled_T.sum())

    @property
    def versions(self) -> list[int]:
        """The weight versions that sampled it, oldest first: one for each segment."""
        return [self.version] if self.versions_T is None else np.unique(self.versions_T).tolist()


@dataclass(frozen=True)
class GroupResult:
    """Successes in [0, 1] of the responses to one drawn prompt, matched to the pool by `prompt_id`.

    `drawn_at` is the step at which the prompt was drawn: a prompt whose first draw was aborted may be in flight again
    when the first responses arrive. `None` assumes the current draw.
    """

    prompt_id: str
    rewards: tuple[float, ...]
    drawn_at: int | None = None


@dataclass(frozen=True)
class AugmentOutcome:
    """The outcome of one request for a new problem from the policy.

    `text` is the new question. When the reply held no question, `text` is the reply; when the request was too long,
    `text` is the request. `reason` says why the problem was refused (`qarl.prompts.augment.REASONS`); it is empty when
    the pool accepted the problem.
    """

    parent_id: str
    text: str
    reason: str = ""
    detail: str = ""
    answer: str = ""


@dataclass(frozen=True)
class TrainSequence:
    """One response as the learner needs it: token ids and, for each response token, log-probs (nats, float32).

    `prox_logprobs_T` is log pi_prox, the policy before the update; a sequence to learn from needs it. `loss_mask_T` is
    False at response tokens that the loss leaves out; None leaves out none. `version` is the weight version that
    sampled the response, -1 when unknown. `id` names the sequence in errors. `sampled_T` and `versions_T` are those of
    `Sample`: the loss leaves given tokens out.
    """

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    sampler_logprobs_T: npt.NDArray[np.float32]
    advantage: float = 0.0
    prox_logprobs_T: npt.NDArray[np.float32] | None = None
    loss_mask_T: Mask | None = None
    version: int = -1
    id: str = ""
    sampled_T: Mask | None = None
    versions_T: Versions | None = None

    @classmethod
    def of(cls, sample: Sample, advantage: float = 0.0, id: str = "") -> Self:
        return cls(
            sample.prompt.token_ids,
            sample.response_ids,
            sample.logprobs_T,
            advantage,
            version=sample.version,
            id=id,
            sampled_T=sample.sampled_T,
            versions_T=sample.versions_T,
        )

    @property
    def turns(self) -> list[tuple[int, int]]:
        """Start and end (one past the last) of every run of response tokens that one version sampled without a given
        token between them. At the start of each the engine prefilled all tokens before it as one prompt."""
        edges = {0, len(self.response_ids)}
        for values_T in (self.sampled_T, self.versions_T):
            edges |= set() if values_T is None else set((np.flatnonzero(np.diff(values_T)) + 1).tolist())
        runs = list(pairwise(sorted(edges))) or [(0, 0)]
        return runs if self.sampled_T is None else [run for run in runs if self.sampled_T[run[0]]]

    @property
    def counted_T(self) -> Mask:
        """True at response tokens that the loss counts."""
        counted_T = np.ones(len(self.response_ids), np.bool_)
        for mask_T in (self.loss_mask_T, self.sampled_T):
            counted_T &= True if mask_T is None else mask_T
        return counted_T

    @property
    def loss_tokens(self) -> int:
        """Response tokens that the loss counts."""
        return int(self.counted_T.sum())

    @property
    def forward_tokens(self) -> int:
        """Tokens of its forward besides the prompt: of the first turn, and of every later one with all before it."""
        (_, first), *later = self.turns
        return first + sum(len(self.prompt_ids) + end for _, end in later)

    def at_sampled(self, values_T: npt.NDArray[Scalar], version: int | None = None) -> npt.NDArray[Scalar]:
        """The values of the sampled response tokens; with `version`, of those that this weight version sampled."""
        if version is not None:
            versions_T = np.full(len(values_T), self.version) if self.versions_T is None else self.versions_T
            return values_T[(versions_T == version) & (True if self.sampled_T is None else self.sampled_T)]
        return values_T if self.sampled_T is None else values_T[self.sampled_T]


@dataclass(frozen=True)
class WorkerInfo:
    """A rollout worker's description of itself. `kernels` are the low-bit kernels that its engine chose."""

    worker: int
    device: str
    kernels: tuple[str, ...]
    node: str
    pid: int
    at_once: int
    """Sequences of `rollout.max_model_len` that the engine samples at once: as many as its KV cache holds, but at most
    `rollout.max_num_seqs`."""


class Activity(NamedTuple):
    """What an actor does now: for example `Activity("sampling", 3, 8)`, 3 of 8 groups done."""

    word: str
    done: int = 0
    of: int = 0


Numerics = Literal["engine", "portable", "stock"]
"""How the learner rounds: as the engine does, as the engine does but in pure torch, or as transformers does."""

"""Values that travel through one step. All are plain, picklable and free of torch and ray.

Suffixes: _T response tokens of one sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Prompt:
    """One problem.

    `id` is unique and stable across runs; `answer` is what the verifier compares with; `level` is a
    label for reports (0 when the data has none); `token_ids` are the prompt's tokens, special tokens included.
    """

    id: str
    text: str
    answer: str
    token_ids: tuple[int, ...]
    level: int = 0


@dataclass(frozen=True)
class SampleRequest:
    """Ask for one response. Equal `seed` and weights give equal tokens, on whichever worker runs it.

    `ignore_eos`: go on after the end token, to `max_new_tokens`.
    """

    prompt: Prompt
    seed: int
    temperature: float
    max_new_tokens: int
    ignore_eos: bool = False


@dataclass(frozen=True)
class Sample:
    """One response and what the sampler said of it.

    `logprobs_T[t]` is log pi_samp of `response_ids[t]` (nats, float32); `version` is the weight version that made
    it; `finish_reason` is "stop" (the end token, which is then the last of `response_ids`) or "length".
    """

    prompt: Prompt
    response_ids: tuple[int, ...]
    logprobs_T: npt.NDArray[np.float32]
    text: str
    finish_reason: str
    version: int
    worker: int = 0


@dataclass(frozen=True)
class Score:
    """A verifier's verdict: reward in [0, 1]; `error` tells why a verifier failed (the reward is then 0)."""

    reward: float
    error: str = ""


@dataclass(frozen=True)
class GroupResult:
    """Rewards in [0, 1] of the responses to one drawn prompt, matched to the pool by `prompt_id`.

    `drawn_at` is the step of the draw that they answer: a prompt whose first draw was aborted may be in flight again
    when the first responses come. None takes them for those of the draw that is in flight.
    """

    prompt_id: str
    rewards: tuple[float, ...]
    drawn_at: int | None = None


@dataclass(frozen=True)
class AugmentOutcome:
    """What became of one problem that the policy was asked for.

    `text` is the new question, or what stands for it: the reply when no question could be read, the request when that
    was too long. `reason` tells why it was refused (`qarl.prompts.augment.REASONS`), empty when the pool took it in.
    """

    parent_id: str
    text: str
    reason: str = ""
    detail: str = ""
    answer: str = ""


@dataclass(frozen=True)
class TrainSequence:
    """What the learner needs of one sample: token ids, where the response begins, sampler log-probs, advantage.

    `loss_mask_T` is False at response tokens that the loss leaves out; None leaves out none. `id` names it in errors.
    """

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    sampler_logprobs_T: npt.NDArray[np.float32]
    advantage: float = 0.0
    loss_mask_T: npt.NDArray[np.bool_] | None = None
    id: str = ""

    @property
    def loss_tokens(self) -> int:
        """Response tokens that the loss counts."""
        return len(self.response_ids) if self.loss_mask_T is None else int(self.loss_mask_T.sum())


@dataclass(frozen=True)
class WorkerInfo:
    """What a rollout worker says of itself at the start: `kernels` are the low-bit kernels that its engine chose."""

    worker: int
    device: str
    kernels: tuple[str, ...]
    node: str
    pid: int


Numerics = Literal["engine", "portable", "stock"]
"""How the learner rounds: as the engine, as the engine in pure torch, as transformers."""

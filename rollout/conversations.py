"""Conversations with environments, in rounds over all workers: one request for each that is still open."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice

import numpy as np

from qarl.errors import QarlError
from qarl.protocols import Environments, Fleet, Prover
from qarl.quant.scheme import QuantScheme
from qarl.seeds import derive_seed
from qarl.tasks.turns import TurnEncoder
from qarl.types import EnvironmentTurn, Prompt, Sample, SampleRequest, Score
from qarl.weights.source import WeightSource


class ConversingFleet:
    """A Fleet each of whose samples is a conversation: its response is every token after the prompt.

    A turn is a request of its own. Its prompt is everything before it, as tokens, and is computed anew: keys and values
    that the engine has decoded differ in their last bits from those that it computes of a prompt, and so would the
    log-probs of sampler and learner.

    Args:
        fleet: all workers; it gets the weights, too.
        encoder: makes tokens of what environments give.
        max_turns: after as many a conversation ends.
        max_model_len: tokens that a conversation may have.
    """

    def __init__(
        self, fleet: Fleet, environments: Environments, encoder: TurnEncoder, max_turns: int, max_model_len: int
    ) -> None:
        self._fleet, self._environments, self._encoder = fleet, environments, encoder
        self._max_turns, self._max_model_len = max_turns, max_model_len
        self._submitted: dict[int, Sequence[SampleRequest]] = {}
        self._next = 0

    def submit(self, groups: Sequence[Sequence[SampleRequest]]) -> list[int]:
        numbers = list(range(self._next, self._next + len(groups)))
        self._next += len(groups)
        self._submitted |= zip(numbers, groups, strict=True)
        return numbers

    def poll(self, timeout_s: float) -> dict[int, list[Sample]]:
        """All groups that were submitted, whatever the time: rounds take the conversations of all of them."""
        groups, self._submitted = self._submitted, {}
        samples = iter(self.sample([request for group in groups.values() for request in group]))
        return {number: list(islice(samples, len(group))) for number, group in groups.items()}

    def abort(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            self._submitted.pop(number, None)

    def sample(self, requests: Sequence[SampleRequest]) -> list[Sample]:
        """One conversation per request, in order."""
        turns = self._environments.reset([request.prompt for request in requests])
        talks = [_Conversation(request, self._encoder, self._max_model_len) for request in requests]
        for talk, turn in zip(talks, turns, strict=True):
            talk.begin(turn)
        for number in range(self._max_turns):
            open_ = {index: talk for index, talk in enumerate(talks) if talk.is_open}
            if not open_:
                break
            samples = self._fleet.sample([talk.request(number) for talk in open_.values()])
            for talk, sample in zip(open_.values(), samples, strict=True):
                talk.add_response(sample)
            answered = {index: talk.turns[-1].text for index, talk in open_.items() if not talk.error}
            for index, turn in self._environments.step(answered).items():
                talks[index].add_turn(turn, is_last=number + 1 == self._max_turns)
        return [talk.sample() for talk in talks]

    def busy_share(self) -> float:
        return self._fleet.busy_share()

    def load(self, weights: WeightSource, prover: Prover | None = None) -> dict[int, float]:
        return self._fleet.load(weights, prover)

    def switch(self, scheme: QuantScheme) -> None:
        self._fleet.switch(scheme)

    def close(self) -> None:
        self._fleet.close()


class _Conversation:
    """One conversation as it grows. It is open while the policy has to answer."""

    def __init__(self, request: SampleRequest, encoder: TurnEncoder, max_model_len: int) -> None:
        self._request, self._encoder, self._max_model_len = request, encoder, max_model_len
        self._prompt: Prompt = request.prompt
        self._ids: tuple[int, ...] = ()
        self._given: list[tuple[int, ...]] = []
        self._reward = 0.0
        self.turns: list[Sample] = []
        self.error = ""
        self.is_open = True

    def begin(self, turn: EnvironmentTurn) -> None:
        """An environment that failed leaves the prompt of the task, to which there is one response."""
        self.error = turn.error
        if turn.given is None or turn.error:
            return
        try:
            ids = self._encoder.prompt(turn)
        except QarlError as error:
            self.error = f"environment {error.what}"
            return
        if len(ids) >= self._max_model_len:
            self.error = f"the environment's prompt of {len(ids)} tokens leaves no room for a response"
            return
        self._prompt = replace(self._prompt, token_ids=ids, text=self._encoder.text(ids))

    def request(self, number: int) -> SampleRequest:
        """What to sample in this round."""
        seed = self._request.seed if number == 0 else derive_seed(self._request.seed, "turn", number)
        prompt = replace(self._prompt, token_ids=self._prompt.token_ids + self._ids)
        longest = min(self._request.max_new_tokens, self._room())
        return replace(self._request, prompt=prompt, seed=seed, max_new_tokens=longest, reuse_cache=number == 0)

    def add_response(self, sample: Sample) -> None:
        self.turns.append(sample)
        self._ids += sample.response_ids
        self.is_open = not self.error and sample.finish_reason != "length"  # a response that was cut off is the last

    def add_turn(self, turn: EnvironmentTurn, is_last: bool) -> None:
        """What the environment answered; given tokens are kept only if the policy goes on."""
        self._reward, self.error = self._reward + turn.reward, turn.error
        if turn.error or turn.done or is_last or not self.is_open:
            self.is_open = False
            return
        try:
            given = self._encoder.following(turn, self._ids[-1])
        except QarlError as error:
            self.error, self.is_open = f"environment {error.what}", False
            return
        if len(given) >= self._room():
            self.is_open = False
            return
        self._given.append(given)
        self._ids += given

    def sample(self) -> Sample:
        last = self.turns[-1]
        logprobs = [self.turns[0].logprobs_T]
        sampled = [np.ones(len(self.turns[0].response_ids), np.bool_)]
        for given, turn in zip(self._given, self.turns[1:], strict=True):
            logprobs += [np.zeros(len(given), np.float32), turn.logprobs_T]
            sampled += [np.zeros(len(given), np.bool_), np.ones(len(turn.response_ids), np.bool_)]
        return replace(
            last,
            prompt=self._prompt,
            response_ids=self._ids,
            logprobs_T=np.concatenate(logprobs),
            sampled_T=np.concatenate(sampled),
            text=self._encoder.text(self._ids),
            score=self._score(),
        )

    def _score(self) -> Score:
        if self.error:
            return Score(0.0, self.error)
        return Score(self._reward, success=min(max(self._reward, 0.0), 1.0))

    def _room(self) -> int:
        return self._max_model_len - len(self._prompt.token_ids) - len(self._ids)

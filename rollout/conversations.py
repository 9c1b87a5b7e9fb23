"""Conversations with environments: each turn is a request of its own."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import islice

import numpy as np
import numpy.typing as npt

from qarl.errors import QarlError
from qarl.protocols import Environments, Fleet, Prover
from qarl.quant.scheme import QuantScheme
from qarl.seeds import derive_seed
from qarl.tasks.turns import TurnEncoder
from qarl.types import EnvironmentTurn, Mask, Prompt, Sample, SampleRequest, Score, Versions
from qarl.weights.source import WeightSource


class ConversingFleet:
    """A Fleet each of whose samples is a conversation: its response is every token after the prompt.

    A turn is a request of its own. Its prompt is everything before it, as tokens, and is computed anew: keys and values
    that the engine has decoded differ in their last bits from those that it computes of a prompt, and so would the
    log-probs of sampler and learner. So weights may come between two turns, each of which is of one version: new
    weights wait for the turns that run, not for their conversations.

    The first turns of a group are one group of `fleet`; after those each conversation goes on by itself. An environment
    that takes its time holds up the caller of `poll`, but not what workers have.

    Args:
        fleet: all workers; it gets the weights, too. `sample` alone needs no more of it than `sample`.
        encoder: makes tokens of what environments give.
        max_turns: after as many a conversation ends.
        max_model_len: tokens that a conversation may have.
    """

    def __init__(
        self, fleet: Fleet, environments: Environments, encoder: TurnEncoder, max_turns: int, max_model_len: int
    ) -> None:
        self._fleet, self._environments = fleet, environments
        self._make = partial(_Conversation, encoder=encoder, max_turns=max_turns, max_model_len=max_model_len)
        self._groups: dict[int, list[_Conversation]] = {}  # by number, until all of its conversations are over
        self._asked: dict[int, list[_Conversation]] = {}  # those whose next turns are this group of `fleet`
        self._next_group = self._next_talk = 0

    def submit(self, groups: Sequence[Sequence[SampleRequest]]) -> list[int]:
        talks = iter(self._begin([request for group in groups for request in group]))
        numbers = list(range(self._next_group, self._next_group + len(groups)))
        self._next_group += len(groups)
        begun = [list(islice(talks, len(group))) for group in groups]
        self._groups |= zip(numbers, begun, strict=True)
        self._ask(begun)
        return numbers

    def poll(self, timeout_s: float) -> dict[int, list[Sample]]:
        turns = [(self._asked.pop(number), turns) for number, turns in self._fleet.poll(timeout_s).items()]
        talks = [talk for of_group, _ in turns for talk in of_group]
        self._answer(talks, [turn for _, of_group in turns for turn in of_group])
        self._ask([[talk] for talk in talks if talk.is_open])
        over = [number for number, group in self._groups.items() if not any(talk.is_open for talk in group)]
        return {number: [talk.sample() for talk in self._groups.pop(number)] for number in over}

    def queued(self) -> set[int]:
        """Groups whose first turns wait. The later turns of a conversation belong to its time."""
        waiting = [self._asked[number] for number in self._fleet.queued()]
        return {number for number, group in self._groups.items() if any(group is turns for turns in waiting)}

    def abort(self, numbers: Sequence[int]) -> None:
        talks = [talk for number in numbers for talk in self._groups.pop(number)]
        turns = [number for number, asked in self._asked.items() if asked[0] in talks]
        for number in turns:
            del self._asked[number]
        self._fleet.abort(turns)
        self._environments.end([talk.number for talk in talks if talk.is_open])

    def sample(self, requests: Sequence[SampleRequest]) -> list[Sample]:
        """One conversation per request, in order, before all that waits: the turns of all are one batch each round."""
        talks = self._begin(requests)
        while open_ := [talk for talk in talks if talk.is_open]:
            self._answer(open_, self._fleet.sample([talk.request() for talk in open_]))
        return [talk.sample() for talk in talks]

    def _begin(self, requests: Sequence[SampleRequest]) -> list["_Conversation"]:
        talks = [self._make(number, request) for number, request in enumerate(requests, self._next_talk)]
        self._next_talk += len(talks)
        turns = self._environments.reset({talk.number: talk.prompt for talk in talks})
        for talk in talks:
            talk.begin(turns[talk.number])
        return talks

    def _ask(self, groups: Sequence[list["_Conversation"]]) -> None:
        """Have the next turns of these conversations sampled."""
        numbers = self._fleet.submit([[talk.request() for talk in group] for group in groups])
        self._asked |= zip(numbers, groups, strict=True)

    def _answer(self, talks: Sequence["_Conversation"], turns: Sequence[Sample]) -> None:
        """Have environments answer the next turn of each conversation."""
        for talk, turn in zip(talks, turns, strict=True):
            talk.add_response(turn)
        heard = {talk.number: talk for talk in talks if not talk.error}
        if heard:
            answers = self._environments.step({number: talk.turns[-1].text for number, talk in heard.items()})
            for number, answer in answers.items():
                heard[number].add_turn(answer)
        self._environments.end([talk.number for talk in talks if not talk.is_open])

    def busy_s(self) -> float:
        return self._fleet.busy_s()

    def load(self, weights: WeightSource, prover: Prover | None = None) -> dict[int, float]:
        return self._fleet.load(weights, prover)

    def sleep(self) -> None:
        self._fleet.sleep()

    def wake(self) -> None:
        self._fleet.wake()

    def switch(self, scheme: QuantScheme) -> None:
        self._fleet.switch(scheme)

    def close(self) -> None:
        self._fleet.close()


class _Conversation:
    """One conversation as it grows. It is open while the policy has to answer."""

    def __init__(
        self, number: int, request: SampleRequest, encoder: TurnEncoder, max_turns: int, max_model_len: int
    ) -> None:
        self.number, self._request, self._encoder = number, request, encoder
        self._max_turns, self._max_model_len = max_turns, max_model_len
        self.prompt: Prompt = request.prompt
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
        self.prompt = replace(self.prompt, token_ids=ids, text=self._encoder.text(ids))

    def request(self) -> SampleRequest:
        """Its next turn."""
        number = len(self.turns)
        seed = self._request.seed if number == 0 else derive_seed(self._request.seed, "turn", number)
        prompt = replace(self.prompt, token_ids=self.prompt.token_ids + self._ids)
        longest = min(self._request.max_new_tokens, self._room())
        return replace(self._request, prompt=prompt, seed=seed, max_new_tokens=longest, reuse_cache=number == 0)

    def add_response(self, sample: Sample) -> None:
        self.turns.append(sample)
        self._ids += sample.response_ids
        self.is_open = not self.error and sample.finish_reason != "length"  # a response that was cut off is the last

    def add_turn(self, turn: EnvironmentTurn) -> None:
        """What the environment answered; given tokens are kept only if the policy goes on."""
        is_last = len(self.turns) == self._max_turns
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
        first, *later = self.turns
        runs = [_run(first)]
        for given, before, turn in zip(self._given, self.turns[:-1], later, strict=True):
            of_given = (
                np.zeros(len(given), np.float32),
                np.zeros(len(given), np.bool_),
                np.full(len(given), before.version),
            )
            runs += [of_given, _run(turn)]
        logprobs_T, sampled_T, versions_T = (np.concatenate(parts) for parts in zip(*runs, strict=True))
        return replace(
            self.turns[-1],
            prompt=self.prompt,
            response_ids=self._ids,
            logprobs_T=logprobs_T,
            sampled_T=sampled_T,
            versions_T=versions_T if versions_T[0] < versions_T[-1] else None,
            text=self._encoder.text(self._ids),
            score=self._score(),
        )

    def _score(self) -> Score:
        if self.error:
            return Score(0.0, self.error)
        return Score(self._reward, success=min(max(self._reward, 0.0), 1.0))

    def _room(self) -> int:
        return self._max_model_len - len(self.prompt.token_ids) - len(self._ids)


def _run(turn: Sample) -> tuple[npt.NDArray[np.float32], Mask, Versions]:
    """Log-probs, what was sampled, and the versions that did."""
    versions_T = np.full(len(turn.response_ids), turn.version) if turn.versions_T is None else turn.versions_T
    return turn.logprobs_T, np.ones(len(turn.response_ids), np.bool_), versions_T

"""Conversations grow turn by turn, token in and token out, and end for one of a few reasons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pytest

from launch.demo.tiny_model import make_tokenizer
from qarl.config.task import SortingTaskConfig
from qarl.tasks.turns import TurnEncoder
from qarl.types import EnvironmentTurn, Prompt, Sample, SampleRequest, Score, TrainSequence
from rollout.conversations import ConversingFleet
from tests.support.fakes import FakeEngine, FakeEnvironments, FakeFleet, make_weights


class Engine(FakeEngine):
    """Two tokens a turn, the seed's and the end token; `cut` seeds of responses that were cut off."""

    cut: Sequence[int] = ()

    def generate(self, requests: Sequence[SampleRequest]) -> list[Sample]:
        return [
            Sample(
                r.prompt,
                (r.seed % 10 + 4, 2)[: r.max_new_tokens],
                np.array([-1.0, -2.0], np.float32)[: r.max_new_tokens],
                str(r.seed % 10),
                "length" if r.seed in self.cut or r.max_new_tokens < 2 else "stop",
                version=self.version,
            )
            for r in requests
        ]


def conversing(
    rules: Mapping[tuple[int, int], EnvironmentTurn], longest: int = 50, cut: Sequence[int] = ()
) -> tuple[ConversingFleet, FakeFleet, FakeEnvironments]:
    engine = Engine(0)
    engine.cut = cut
    fleet, environments = FakeFleet([engine]), FakeEnvironments(rules)
    encoder = TurnEncoder(make_tokenizer(64), SortingTaskConfig())
    return ConversingFleet(fleet, environments, encoder, 3, longest), fleet, environments


def requests(count: int) -> list[SampleRequest]:
    return [SampleRequest(Prompt(f"p{i}", "", "", (1, 5)), i, 1.0, 9) for i in range(count)]


def converse(
    rules: Mapping[tuple[int, int], EnvironmentTurn], count: int = 1, longest: int = 50, cut: Sequence[int] = ()
) -> tuple[list[Sample], FakeFleet, FakeEnvironments]:
    talks, fleet, environments = conversing(rules, longest, cut)
    samples = talks.sample(requests(count))
    assert not environments.open
    return samples, fleet, environments


def test_a_conversation_is_its_turns_and_what_was_given_between() -> None:
    (sample,), fleet, environments = converse({(0, 3): EnvironmentTurn(None, 0.5, done=True)})
    first, second, third = (requests[0] for requests in fleet.requests)
    seven = make_tokenizer(64).convert_tokens_to_ids("7")
    assert first.prompt.token_ids == (1, 5)
    assert second.prompt.token_ids == (1, 5, *sample.response_ids[:3])
    assert third.prompt.token_ids == (1, 5, *sample.response_ids[:6])
    assert [first.reuse_cache, second.reuse_cache, third.reuse_cache] == [True, False, False]
    assert len({first.seed, second.seed, third.seed}) == 3
    assert sample.response_ids[2] == sample.response_ids[5] == seven
    assert sample.sampled_T is not None
    assert sample.sampled_T.tolist() == [True, True, False, True, True, False, True, True]
    assert sample.logprobs_T.tolist() == [-1, -2, 0, -1, -2, 0, -1, -2]
    assert sample.score == Score(1.0)
    assert sample.num_sampled == 6
    assert TrainSequence.of(sample).turns == [(0, 2), (3, 5), (6, 8)]
    assert sample.text.count("<eos>") == 3
    assert len(environments.heard) == 3


def test_one_turn_is_what_the_fleet_samples() -> None:
    (sample,), fleet, _ = converse({(0, 1): EnvironmentTurn("7", 1.0, done=True)})
    assert fleet.requests == [[SampleRequest(sample.prompt, 0, 1.0, 9)]]
    assert (sample.response_ids, sample.logprobs_T.tolist()) == ((4, 2), [-1, -2])
    assert TrainSequence.of(sample).turns == [(0, 2)]


def test_open_conversations_are_one_batch_each_round() -> None:
    samples, fleet, _ = converse({(1, 1): EnvironmentTurn(None, 1.0, done=True)}, count=3)
    assert [len(requests) for requests in fleet.requests] == [3, 2, 2]
    assert [sample.num_sampled for sample in samples] == [6, 2, 6]
    assert [sample.score for sample in samples] == [Score(0.75), Score(1.0), Score(0.75)]


def test_groups_come_as_they_finish_and_weights_come_between_turns() -> None:
    """Conversations of one, two and three turns; the weights change after the second."""
    over = EnvironmentTurn(done=True)
    talks, fleet, environments = conversing({(0, 1): over, (2, 2): over})
    talks.load(make_weights(4))
    one, two, three = requests(3)
    assert talks.submit([[one], [two, three], [two]]) == [0, 1, 2]
    assert [len(group) for group in talks.poll(0.0).values()] == [1]
    talks.abort([2])
    assert environments.open == {1, 2}
    talks.load(make_weights(5))
    assert talks.poll(0.0) == {}
    ((number, samples),) = talks.poll(0.0).items()
    assert (number, [sample.versions for sample in samples], samples[0].version) == (1, [[4, 5], [4]], 5)
    assert TrainSequence.of(samples[0]).turns == [(0, 2), (3, 5), (6, 8)]
    assert samples[0].versions_T is not None
    assert samples[0].versions_T.tolist() == [4, 4, 4, 4, 4, 4, 5, 5]
    assert not environments.open
    assert fleet.finished == {}


def test_a_group_is_queued_while_its_first_turns_are() -> None:
    talks, fleet, _ = conversing({})
    talks.load(make_weights(4))
    first, second = talks.submit([requests(1), requests(2)])
    fleet.queued = lambda: {0, 1}  # type: ignore[method-assign]
    assert talks.queued() == {first, second}
    assert talks.poll(0.0) == {}
    fleet.queued = lambda: {2, 3, 4}  # type: ignore[method-assign]
    assert talks.queued() == set()  # second turns


def test_a_response_that_was_cut_off_is_heard_and_is_the_last() -> None:
    (sample,), _, environments = converse({}, cut=[0])
    assert environments.heard == [{0: "0"}]
    assert (sample.num_sampled, sample.finish_reason, sample.score) == (2, "length", Score(0.25))


@pytest.mark.parametrize(("longest", "tokens"), [(50, 8), (10, 8), (9, 7), (8, 5), (5, 2), (3, 1)])
def test_a_conversation_ends_where_the_context_does(longest: int, tokens: int) -> None:
    (sample,), _, _ = converse({}, longest=longest)
    assert len(sample.response_ids) == tokens
    assert sample.sampled_T is not None
    assert sample.sampled_T[-1]


@pytest.mark.parametrize(
    ("turn", "error"),
    [
        (EnvironmentTurn(error="timed out"), "timed out"),
        (EnvironmentTurn("", 0.25), "environment gave nothing, and is not done"),
    ],
)
def test_a_failure_costs_the_reward_and_keeps_the_tokens(turn: EnvironmentTurn, error: str) -> None:
    samples, _, _ = converse({(0, 1): turn}, count=2)
    assert samples[0].score == Score(0.0, error)
    assert samples[0].num_sampled == 2
    assert samples[1].score == Score(0.75)


@pytest.mark.parametrize(("reward", "success"), [(-2.0, 0.0), (0.25, 0.25), (7.0, 1.0)])
def test_any_reward_trains_and_its_success_lies_between_0_and_1(reward: float, success: float) -> None:
    (sample,), _, _ = converse({(0, 1): EnvironmentTurn("", reward, done=True)})
    assert sample.score == Score(reward)
    assert sample.score.solved == success


def test_an_environment_may_give_the_prompt() -> None:
    (sample,), fleet, _ = converse({(0, 0): EnvironmentTurn("77=")})
    assert sample.prompt.text == "<bos>77="
    assert fleet.requests[0][0].prompt.token_ids == sample.prompt.token_ids


@pytest.mark.parametrize("turn", [EnvironmentTurn(error="died"), EnvironmentTurn("7" * 60)])
def test_without_its_prompt_there_is_one_response_of_reward_zero(turn: EnvironmentTurn) -> None:
    (sample,), fleet, environments = converse({(0, 0): turn})
    assert len(fleet.requests) == 1
    assert environments.heard == []
    assert sample.prompt.token_ids == (1, 5)
    assert sample.score is not None
    assert sample.score.error

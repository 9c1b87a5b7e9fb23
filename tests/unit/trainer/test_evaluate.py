"""The evaluation among fakes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.support.fakes import FakeFleet, FakeRewards, make_prompts
from tests.support.runs import HELDOUT, make_config
from trainer.evaluate import evaluate


def given_in_order(*rewards: float) -> FakeRewards:
    left = iter(rewards)
    return FakeRewards(lambda _: next(left))


def test_evaluation_by_hand() -> None:
    prompts = [replace(prompt, level=level) for prompt, level in zip(make_prompts(3), (2, 2, 3), strict=True)]
    rewards = given_in_order(1, 0, 0, 0, 0.5, 1, 1, 0, 1)
    result = evaluate(FakeFleet(), rewards, prompts, make_config())
    assert result == pytest.approx(
        {
            "pass@1": (0.5 + 0.0 + 0.5) / 3,
            "pass@2": (1 + 0 + 1) / 3,
            "greedy": 2 / 3,
            "level_02/pass@1": 0.25,
            "level_03/pass@1": 0.5,
        }
    )


def test_a_part_of_the_reward_is_no_success_and_has_a_name_of_its_own() -> None:
    reward = {"kind": "custom", "function": "mine.py:judge"}
    config = make_config(eval={"greedy": True, "num_samples": 2}, reward=reward)
    prompts = [replace(prompt, level=7) for prompt in make_prompts(1)]
    result = evaluate(FakeFleet(), given_in_order(0.9, 0.5, 0.99), prompts, config)
    assert result == pytest.approx({"pass@1": 0.0, "pass@2": 0.0, "greedy": 0.0, "mean_reward": 0.7})


def test_a_figure_for_each_of_several_heldout_sets() -> None:
    names = ("gsm8k", "math", "gsm8k")
    prompts = [replace(p, level=1, heldout_set=name) for p, name in zip(make_prompts(3), names, strict=True)]
    config = make_config(eval={"greedy": False, "num_samples": 1})
    result = evaluate(FakeFleet(), given_in_order(1, 0, 0), prompts, config)
    assert result == pytest.approx({"pass@1": 1 / 3, "gsm8k/pass@1": 0.5, "math/pass@1": 0.0})


def test_requests_end_as_the_config_says() -> None:
    stop = {"max_new_tokens": 8, "stop": ["\n\n"], "stop_token_ids": [3], "ignore_eos": True}
    fleet = FakeFleet()
    evaluate(fleet, FakeRewards(), HELDOUT, make_config(rollout={"sampling": stop}))
    assert {(r.stop, r.stop_token_ids, r.ignore_eos) for r in fleet.requests[0]} == {(("\n\n",), (3,), True)}


def test_evaluation_of_one_level_without_greedy() -> None:
    prompts = [replace(prompt, level=7) for prompt in make_prompts(2)]
    config = make_config(eval={"greedy": False, "num_samples": 1})
    assert evaluate(FakeFleet(), given_in_order(1, 0), prompts, config) == {"pass@1": 0.5}


def test_evaluations_ask_for_the_same_samples_each_time() -> None:
    fleet, config = FakeFleet(), make_config()
    first, again = (evaluate(fleet, FakeRewards(), HELDOUT, config) for _ in range(2))
    assert first == again
    assert fleet.requests[0] == fleet.requests[1]
    sampled, greedy = fleet.requests[0][:18], fleet.requests[0][18:]
    assert {(r.temperature, r.max_new_tokens) for r in sampled} == {(1.0, 8)}
    assert {(r.temperature, r.max_new_tokens) for r in greedy} == {(0.0, 8)}
    assert [r.prompt for r in greedy] == HELDOUT
    assert len({r.seed for r in sampled}) == len(sampled)
    # The order of the prompts does not matter to a prompt's seeds.
    evaluate(fleet, FakeRewards(), HELDOUT[::-1], config)
    assert set(fleet.requests[2]) == set(fleet.requests[0])

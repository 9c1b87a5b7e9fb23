"""Generated problems: splits are disjoint, weights and levels hold, and a wrong config names the nearest right one."""

from __future__ import annotations

import pickle
import re
from collections import Counter
from typing import Any

import pytest
from pydantic import ValidationError
from reasoning_gym.factory import DATASETS

from qarl.config.task import GymDatasetConfig, ReasoningGymTaskConfig
from qarl.errors import ConfigError
from qarl.tasks import make_task
from rewards.reasoning_gym import find_answer, verify

ONE_DIGIT = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
NEEDS_DATASETS = {"composite"}  # mixes others, as task.datasets does
SEVERAL_ANSWERS = {"boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour"}  # name no right one


def encode(text: str) -> list[int]:
    return [ord(char) for char in text]


def chain_sum(weight: float = 1.0, **settings: Any) -> GymDatasetConfig:
    return GymDatasetConfig(name="chain_sum", weight=weight, settings=ONE_DIGIT | settings)


def config_of(*datasets: GymDatasetConfig, **keys: Any) -> ReasoningGymTaskConfig:
    return ReasoningGymTaskConfig(datasets=list(datasets), **keys)


def quiet(line: str) -> None:
    """Takes lines and forgets them."""


def test_splits_are_disjoint_distinct_and_seeded() -> None:
    config = config_of(chain_sum(max_terms=4), num_prompts=300)
    train, heldout = make_task(config, encode).load(0, 100, quiet)
    questions = [prompt.text for prompt in train + heldout]
    assert (len(train), len(heldout)) == (300, 100)
    assert len(set(questions)) == len({prompt.id for prompt in train + heldout}) == 400
    assert (train, heldout) == make_task(config, encode).load(0, 100, quiet)
    other, _ = make_task(config, encode).load(1, 100, quiet)
    assert len({prompt.text for prompt in other} - set(questions)) > 200


def test_heldout_questions_come_first_where_there_are_few() -> None:
    """Two terms of one digit make 200 questions."""
    lines: list[str] = []
    train, heldout = make_task(config_of(chain_sum(), num_prompts=1000), encode).load(0, 60, lines.append)
    assert len(heldout) == 60
    assert 120 <= len(train) <= 140
    assert not {prompt.text for prompt in train} & {prompt.text for prompt in heldout}
    assert lines == [f"only {len(train)} of 1000 level 1 training prompts exist"]
    with pytest.raises(ConfigError, match=r"task\.datasets: 200 held-out problems leave none for training"):
        make_task(config_of(chain_sum(), num_prompts=10), encode).load(0, 2000, quiet)


def test_levels_are_the_datasets_and_weights_their_shares() -> None:
    datasets = chain_sum(3.0, min_digits=4, max_digits=4), GymDatasetConfig(name="spell_backward")
    train, heldout = make_task(config_of(*datasets, num_prompts=80), encode).load(0, 11, quiet)
    assert Counter(prompt.level for prompt in train) == {1: 60, 2: 20}
    assert [prompt.level for prompt in heldout] == [1, 2] * 5 + [1]
    assert all(prompt.id.startswith(("", "chain_sum/", "spell_backward/")[prompt.level]) for prompt in train)


def test_levels_of_a_curriculum() -> None:
    """Of chain_sum: two terms of one digit at level 0, three of two at level 1; a setting comes before the level's."""
    leveled = GymDatasetConfig(name="chain_sum", weight=3.0, levels=[0, 1], settings={"max_digits": 2})
    train, heldout = make_task(config_of(leveled, chain_sum(1.0), num_prompts=80), encode).load(0, 6, quiet)
    assert Counter(prompt.level for prompt in train) == {1: 30, 2: 30, 3: 20}
    assert {prompt.level for prompt in heldout} == {1, 2, 3}
    for level, terms, digits in ((1, {2}, {1, 2}), (2, {3}, {2})):
        numbers = [re.findall("[0-9]+", prompt.text) for prompt in train if prompt.level == level]
        assert {len(found) for found in numbers} == terms
        assert {len(number) for found in numbers for number in found} == digits
    assert {p.verifier_kwargs["settings"]["max_terms"] for p in train if p.level == 2} == {3}
    assert {prompt.source for prompt in train} == {"chain_sum"}


def test_the_template_surrounds_the_question() -> None:
    task = make_task(config_of(chain_sum(), prompt_template="Q: {question}\nA:"), encode)
    (prompt, *_), _ = task.load(0, 1, quiet)
    question = prompt.verifier_kwargs["entry"]["question"]
    assert prompt.text == f"Q: {question}\nA:"
    assert prompt.token_ids == tuple(encode(prompt.text))
    assert task.question(prompt) == question


@pytest.mark.parametrize(
    ("dataset", "line"),
    [
        (
            {"name": "chain_summ"},
            "task.datasets[0].name: reasoning-gym has no generator 'chain_summ'; did you mean chain_sum",
        ),
        (
            {"name": "chain_sum", "settings": {"min_term": 2}},
            "task.datasets[0].settings: chain_sum has no setting 'min_term'; did you mean min_terms, max_terms",
        ),
        (
            {"name": "chain_sum", "settings": {"seed": 2}},
            "chain_sum has no setting 'seed'; it has allow_negation, max_digits",
        ),
        (
            {"name": "chain_sum", "settings": {"min_terms": 9}},
            "task.datasets[0].settings: chain_sum refuses them: max_terms must be >= min_terms",
        ),
        (
            {"name": "chain_sum", "levels": [11]},
            "task.datasets[0].levels: chain_sum has no level 11; the highest is 10",
        ),
        ({"name": "acre", "levels": [0]}, "task.datasets[0].levels: acre has no curriculum in reasoning-gym"),
        ({"name": "caesar_cipher", "levels": [3]}, "caesar_cipher refuses them: rotation must be in range [1,25]"),
        ({"name": "chain_sum", "settings": {"min_terms": "two"}}, "chain_sum refuses them: '>' not supported"),
    ],
)
def test_wrong_datasets_are_one_line(dataset: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_task(config_of(GymDatasetConfig(**dataset)))
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("pattern", "fault"), [("[0-9", "must be a regular expression"), ("(a)(b)", "at most one group")]
)
def test_a_wrong_pattern_is_refused(pattern: str, fault: str) -> None:
    with pytest.raises(ValidationError, match=fault):
        config_of(chain_sum(), answer_pattern=pattern)


@pytest.mark.parametrize(
    ("text", "pattern", "answer"),
    [
        (" 12\n", "", "12"),
        ("3 + 4 = 7, then 7 - 9 = -2.", "-?[0-9]+", "-2"),
        ("<answer>3</answer> no: <answer> 4 </answer>", "<answer>(.*?)</answer>", "4"),
        ("no number", "[0-9]+", None),
    ],
)
def test_find_answer(text: str, pattern: str, answer: str | None) -> None:
    assert find_answer(text, pattern) == answer


def test_the_scorer_grades_and_never_sees_what_was_not_answered() -> None:
    dataset = GymDatasetConfig(name="spell_backward", settings={"min_word_len": 4, "max_word_len": 4})
    (prompt, *_), _ = make_task(config_of(dataset, answer_pattern="[a-z]+"), encode).load(0, 1, quiet)
    word = prompt.answer
    assert verify(f"It is: {word}", "length", "", **prompt.verifier_kwargs) == 1.0
    assert 0.0 < verify(word[:2] + "zz", "stop", word, **prompt.verifier_kwargs) < 1.0
    assert verify("", "stop", word, **prompt.verifier_kwargs) == 0.0


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(DATASETS) - NEEDS_DATASETS))
def test_every_generator_makes_problems_that_its_scorer_judges_in_another_process(name: str) -> None:
    task = make_task(config_of(GymDatasetConfig(name=name), num_prompts=2), encode)
    train, heldout = task.load(0, 2, quiet)
    assert (len(train), len(heldout)) == (2, 2)
    for prompt in pickle.loads(pickle.dumps(train + heldout)):
        reward = verify(prompt.answer, "stop", prompt.answer, **prompt.verifier_kwargs)
        assert 0.0 <= reward <= 1.0
        assert reward == 1.0 or name in SEVERAL_ANSWERS

"""New problems: what is asked, what is read, what is refused and why, who validates, and exact resume."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from typing import Any

import pytest

from qarl.config.policy import SamplingConfig
from qarl.config.pool import AugmentConfig, PoolConfig, VoteConfig
from qarl.config.task import DatasetTaskConfig, SortingTaskConfig
from qarl.errors import CheckpointError, RolloutError
from qarl.prompts.augment import REASONS, Augmenter, beginning
from qarl.prompts.pool import Pool
from qarl.prompts.validate import ProgramCheck, SelfConsistency, Verdict
from qarl.tasks import make_task, sorting
from qarl.types import AugmentOutcome, GroupResult, Prompt
from tests.support.augment import SORTING, STORY, Case, Listed, Slow, encode, reply, sorting_case, story_case, tagged

OTHER = "A train leaves at noon and runs for two hours at sixty miles an hour. How far does it get?"


# --- asking


def test_only_measured_prompts_near_the_target_are_parents() -> None:
    problems = make_task(SortingTaskConfig(levels=[2]), encode)
    prompts = [problems.prompt(f"{n}0", "", 0) for n in range(1, 6)]
    pool = Pool(prompts, PoolConfig(cooldown_steps=0, prior_strength=1e-9), seed=0)
    pool.draw(5, 0)
    rates = {"10": 0.0, "20": 0.25, "30": 0.5, "40": 0.76}  # 50 stays unseen
    pool.observe([GroupResult(f"sorting/{digits}", (rate,)) for digits, rate in rates.items()], 0)
    config = SORTING.model_copy(update={"per_step": 9})
    augmenter = Augmenter(
        config, pool, problems, ProgramCheck(sorting.solve), prompts, [], SamplingConfig(max_new_tokens=9), 99, 0
    )
    asked = {request.prompt.text for request in augmenter.requests(prompts, 1)}
    assert asked == {"20=2", "30=3"}
    assert augmenter.requests([], 2) == []


def test_the_quota_and_the_requests() -> None:
    case = sorting_case("1234", "2345", "3456", "4567", "5678", config=SORTING.model_copy(update={"per_step": 3}))
    requests = case.ask(step=1)
    assert len({request.prompt.text for request in requests}) == len({request.seed for request in requests}) == 3
    assert {(request.temperature, request.max_new_tokens) for request in requests} == {(0.7, 9)}
    assert all(request.prompt.token_ids == tuple(encode(request.prompt.text)) for request in requests)
    assert case.ask(step=1) == requests
    assert case.ask(step=2) != requests


def test_the_template() -> None:
    case = story_case(config={"template": "{question} ({answer}) {beginning} {other} {{"})
    (request,) = case.ask()
    assert request.prompt.text == f"{STORY} (answer) {STORY[:47].rpartition(' ')[0]} {{other}} {{{{"
    assert beginning("12345") == "12"
    assert beginning("ab cd ef gh") == "ab"


def test_a_placeholder_in_a_question_is_left_alone() -> None:
    case = Case(Listed(()), ["What is {answer}?"], AugmentConfig(per_step=1, template="New: {question}"), Slow())
    assert case.ask()[0].prompt.text == "New: What is {answer}?"


# --- reading and refusing


@pytest.mark.parametrize("text", ["34x", "=", "3 4", "34\n5", "34" * 4])
def test_what_is_no_problem_is_refused(text: str) -> None:
    case = sorting_case("6543")
    (outcome,) = case.read(text)
    assert (outcome.reason, outcome.text, outcome.parent_id) == ("parse", f"65{text}", "sorting/6543")
    assert case.metrics() == {"requested": 1, "rejected_parse": 1}


def test_a_reply_that_was_cut_short_is_refused() -> None:
    (outcome,) = sorting_case("6543").read("34", finish_reason="length")
    assert (outcome.reason, outcome.detail) == ("parse", "cut short")


@pytest.mark.parametrize("text", [OTHER, tagged(OTHER) + tagged(OTHER), "<problem> </problem>", tagged("\u200b")])
def test_the_pattern_must_match_once(text: str) -> None:
    (outcome,) = story_case().read(text)
    assert outcome.reason == "parse"


def test_samples_of_other_requests_are_refused() -> None:
    """They are told apart by place: those of an earlier step would be read as another parent's children."""
    case = sorting_case("6543", "1212")
    early = case.ask(step=1)
    late = case.ask(step=2)
    with pytest.raises(RolloutError, match=r"a sample of 'augment/1/sorting/\d+', which is not in the last requests"):
        case.augmenter.receive([reply(request, "71") for request in early])
    case.augmenter.receive([reply(request, "71") for request in late])
    with pytest.raises(RolloutError, match="a sample of 'augment/2"):
        case.augmenter.receive([reply(request, "71") for request in late])
    assert case.metrics()["pending"] == 2


def test_a_new_problem_enters_the_pool_one_step_later_with_its_answer() -> None:
    case = sorting_case("6543")
    assert case.read("7171") == []
    assert case.metrics() == {"requested": 1, "pending": 1}
    assert case.pool.metrics()["pool/size"] == 1
    case.augmenter.resolve_pending()
    (outcome,) = case.augmenter.outcomes()
    assert outcome == AugmentOutcome("sorting/6543", "657171", "", "", "115677")
    assert case.metrics() == {"requested": 1, "accepted": 1, "acceptance": 1}
    child = next(prompt for prompt in case.pool.draw(9, 1) if prompt.id == "sorting/657171")
    assert child == Prompt("sorting/657171", "657171=", "115677", tuple(encode("657171=")), 6)
    assert case.pool.metrics()["pool/augmented_share"] == 0.5


def test_what_requests_and_problems_take_from_run_and_parent() -> None:
    """Stop strings end answers, so a request for a problem has none; a problem is of its parent's source."""
    case = sorting_case("6543")
    case.prompts = [replace(prompt, source="sums") for prompt in case.prompts]
    sampling = SamplingConfig(temperature=0.7, max_new_tokens=9, stop=["="], stop_token_ids=[3])
    case.augmenter._sampling = sampling
    [request] = case.ask()
    assert (request.temperature, request.max_new_tokens, request.stop, request.stop_token_ids) == (0.7, 9, (), (3,))
    assert case.read("7171") == []
    case.augmenter.resolve_pending()
    assert {prompt.source for prompt in case.pool.draw(9, 1) if prompt.id == "sorting/657171"} == {"sums"}


def test_a_problem_with_a_special_token_is_refused() -> None:
    problems = make_task(DatasetTaskConfig(train_path="t", heldout_path="h"), encode, re.compile("<eos>"))
    case = Case(problems, [STORY], AugmentConfig(per_step=1), Slow())
    (outcome,) = case.read(tagged("What is <eos>2 times six?"))
    assert (outcome.reason, outcome.detail) == ("parse", "not of the task's form")


def test_a_held_out_answer_is_refused_whatever_the_order_of_its_digits() -> None:
    heldout = next(d for d in (f"65{n:02d}" for n in range(100)) if sorting.is_heldout(sorting.solve(d)))
    (outcome,) = sorting_case("6543").read(heldout[2:])
    assert (outcome.reason, outcome.detail) == ("leak", "held out by the task's rule")


@pytest.mark.parametrize("planted", ["listed", "heldout"])
@pytest.mark.parametrize("text", [OTHER, OTHER.upper(), f"Here: {OTHER}", OTHER.replace("sixty", "fifty")])
def test_a_planted_leak_of_a_held_out_question_is_refused(planted: str, text: str) -> None:
    case = story_case(**{planted: [OTHER]})
    (outcome,) = case.read(tagged(text))
    assert outcome.reason == "leak"
    assert case.read(tagged("What is two times six?")) == []


@pytest.mark.parametrize(("sign", "typeset"), [("'", "\u2019"), ("a", "a\u200b")])
def test_a_planted_leak_in_other_typography_is_refused(sign: str, typeset: str) -> None:
    """Each such sign, unless it is read as the plain one, breaks all n-grams that hold it."""
    secret = "Anna's brother-in-law takes three of Ben's apples and Eva's pears. Who hasn't got a half-empty bag?"
    for held, told in [(secret, secret.replace(sign, typeset)), (secret.replace(sign, typeset), secret)]:
        (outcome,) = Case(Listed([held]), [STORY], AugmentConfig(per_step=1), Slow()).read(tagged(told))
        assert outcome.reason == "leak"


@pytest.mark.parametrize("text", ["Well: what is 2 + 2?", "What is 2+2?", "is 2+2"])
def test_a_short_held_out_question_is_no_secret_either(text: str) -> None:
    """Shorter than an n-gram, and with words around it or less of them."""
    problems = Listed(["What is 2+2?"])
    case = Case(problems, [STORY], AugmentConfig(per_step=1, ngram=8), Slow())
    assert [outcome.reason for outcome in case.read(tagged(text))] == ["leak"]
    assert case.read(tagged("What is 2+3?")) == []


def test_a_near_duplicate_of_the_pool_is_refused() -> None:
    case = story_case()
    copies = [STORY, STORY.lower().replace("?", " ?"), f"Hm. {STORY}", STORY.replace("Anna", "Eva")]
    assert [outcome.reason for text in copies for outcome in case.read(tagged(text))] == ["duplicate"] * 4
    changed = STORY.replace("seven", "nine").replace("three", "two").replace("apples", "pears")
    assert case.read(tagged(changed)) == []
    assert [outcome.reason for outcome in case.read(tagged(changed))] == ["duplicate"]  # it waits in the queue


def test_what_is_refused_once_is_not_judged_again() -> None:
    validator = Slow()
    case = story_case(validator)
    case.read(tagged(OTHER))
    validator.known[OTHER] = Verdict(None, "no answer")
    case.augmenter.resolve_pending()
    assert [(o.reason, o.detail) for o in case.augmenter.outcomes()] == [("invalid", "no answer")]
    assert [o.reason for o in case.read(tagged(OTHER))] == ["duplicate"]
    assert validator.submitted == [OTHER]


def test_too_long_to_ask_and_too_long_to_use() -> None:
    case = story_case(longest=len(STORY) + 50)
    assert case.ask() == []
    (outcome,) = case.augmenter.outcomes()
    assert (outcome.reason, outcome.detail[:16]) == ("length", "the request has ")
    short = story_case(config={"template": "{question}"}, longest=len(STORY) + 10)
    (outcome,) = short.read(tagged(OTHER + " Give it in miles and then say it in kilometres."))
    assert outcome.reason == "length"


def test_budget_and_queue_are_bounded() -> None:
    case = sorting_case("6543", config=SORTING.model_copy(update={"budget": 2, "max_pending": 1}))
    assert case.read("71") == []
    assert case.ask() == []  # one is waiting
    case.augmenter.resolve_pending()
    assert [o.reason for o in case.read("72")] == [""]  # that of 6571
    case.augmenter.resolve_pending()
    assert [o.reason for o in case.read("7371")] == ["", "budget"]


def test_a_full_pool_refuses() -> None:
    case = sorting_case("6543", pool=PoolConfig(capacity=1, cooldown_steps=0))
    case.read("71")
    case.augmenter.resolve_pending()
    assert [o.reason for o in case.augmenter.outcomes()] == ["full"]
    assert set(case.metrics()) <= {"requested", "acceptance", *(f"rejected_{reason}" for reason in REASONS)}


# --- validating


def test_verdicts_are_taken_in_the_order_of_submission_and_never_waited_for() -> None:
    validator = Slow()
    case = Case(Listed(()), [STORY], AugmentConfig(per_step=1), validator)
    questions = [f"What is {n} times {n} plus one?" for n in range(3)]
    for question in questions:
        assert case.read(tagged(question)) == []
    assert validator.submitted == questions
    validator.known = {questions[1]: Verdict("2"), questions[2]: Verdict(None, "unclear")}
    case.augmenter.resolve_pending()
    assert case.augmenter.outcomes() == []  # the first is not known yet
    validator.known[questions[0]] = Verdict("1")
    case.augmenter.resolve_pending()
    assert [(o.text, o.answer, o.reason) for o in case.augmenter.outcomes()] == [
        (questions[0], "1", ""),
        (questions[1], "2", ""),
        (questions[2], "", "invalid"),
    ]


@pytest.mark.parametrize(
    ("replies", "answer", "reason"),
    [
        (["4", "4", "5", ""], "4", ""),
        (["4", "5", "6", ""], None, "the most frequent answer has 1 of 4 votes"),
        (["5", "5", "4", "4"], "5", ""),
        (["", "no", "", ""], None, "no reply has an answer"),
    ],
)
def test_self_consistency(replies: list[str], answer: str | None, reason: str) -> None:
    votes = SelfConsistency(VoteConfig(num_samples=4, threshold=0.5, answer_pattern="([0-9])"))
    assert votes.verdict("q", []) is None
    assert votes.verdict("q", replies) == Verdict(answer, reason)


def test_the_last_boxed_answer_counts() -> None:
    votes = SelfConsistency(VoteConfig(threshold=1.0))
    assert votes.verdict("q", [r"so \boxed{3}, no: \boxed{\frac{1}{2}}"]) == Verdict(r"\frac{1}{2}")


def test_the_policy_votes_with_the_next_steps_rollouts() -> None:
    votes = SelfConsistency(VoteConfig(num_samples=3, threshold=0.6, answer_pattern="([0-9]+)"))
    case = Case(Listed(()), [STORY], AugmentConfig(per_step=1), votes)
    case.read(tagged("What is 2+2?"))
    case.augmenter.resolve_pending()
    (ask, *cast) = case.ask(step=2)
    assert [request.prompt.text for request in cast] == ["Solve: What is 2+2?"] * 3
    assert len({request.seed for request in (ask, *cast)}) == 4
    texts = [("none", "stop"), ("4", "stop"), ("4", "stop"), ("5", "length")]
    case.augmenter.receive([reply(r, *text) for r, text in zip((ask, *cast), texts, strict=True)])
    assert len(case.ask(step=3)) == 1  # nobody is asked twice
    case.augmenter.resolve_pending()
    assert [(o.reason, o.answer) for o in case.augmenter.outcomes()] == [("parse", ""), ("", "4")]


# --- state


def through_json(augmenter: Augmenter) -> Any:
    return json.loads(json.dumps(augmenter.state_dict(), allow_nan=False))


def test_a_resumed_augmenter_goes_on_as_the_other() -> None:
    first, second = (sorting_case("6543", "1212", "9876") for _ in range(2))
    first.read("71", "72")
    second.augmenter.load_state_dict(through_json(first.augmenter))
    for case in (first, second):
        case.augmenter.outcomes()
        case.augmenter.resolve_pending()
    assert first.augmenter.outcomes() == second.augmenter.outcomes()
    assert first.ask(step=2) == second.ask(step=2)
    assert first.read("71") == second.read("71")
    assert first.augmenter.metrics() == second.augmenter.metrics()
    assert first.augmenter.state_dict() == second.augmenter.state_dict()


def test_a_resumed_validator_gets_the_queue_again() -> None:
    first, validator = story_case(), Slow()
    first.read(tagged(OTHER))
    story_case(validator).augmenter.load_state_dict(through_json(first.augmenter))
    assert validator.submitted == [OTHER]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 9}, "version 9, this qarl reads 1"),
        ({"queue": [{"no": 1}]}, "damaged"),
        ({"queue": [{"question": "", "parent_id": "", "level": 1, "no": 1}]}, "damaged .*'no'|damaged .*\\.no"),
        ({"queued": None}, "damaged"),
        ({"counts": 3}, "damaged"),
        ({"counts": {"accepted": "many"}}, "damaged"),
        ({"counts": {"accepted": -1}}, "damaged .*input_value=-1"),
        ({"counts": {"accepted": math.inf}}, "damaged .*input_value=inf"),
        ({"queued": "abc"}, "damaged .*valid list .*input_value='abc'"),
        ({"queue": [{"question": "5", "parent_id": "", "level": "1"}]}, "damaged .*input_value='1'"),
        ({"queue": [{"question": "5", "parent_id": "", "level": 1}]}, "'5' is in the queue but not in"),
        ({"queue": [{"question": 5, "parent_id": "", "level": 1}]}, "damaged .*valid string .*input_value=5"),
        ({"queue": [{"question": "5", "parent_id": "", "level": 1, "replies": "5"}]}, "damaged .*valid list .*'5'"),
    ],
)
def test_a_foreign_state_is_refused(change: dict[str, Any], message: str) -> None:
    augmenter = sorting_case("6543").augmenter
    with pytest.raises(CheckpointError, match=message):
        augmenter.load_state_dict({**through_json(augmenter), **change})

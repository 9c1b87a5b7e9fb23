"""The teacher's client against a server of this process that fails as it is told."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from launch.run.prompts import make_augmenter
from qarl.config.io import validate
from qarl.config.pool import AugmentConfig, TeacherConfig
from qarl.errors import ConfigError, TeacherError
from qarl.prompts.pool import Pool
from qarl.prompts.validate import ProgramCheck, SelfConsistency, Verdict
from qarl.tasks import make_task
from rewards import endpoint as endpoint_module
from rewards import teacher as teacher_module
from rewards.teacher import Teacher
from tests.support.augment import Case, Listed, tagged
from tests.support.chat_server import WAIT_S, Stub, completion, serving


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stub]:
    monkeypatch.setattr(endpoint_module, "FIRST_PAUSE_S", 0.01)
    with serving() as server:
        yield server


def config_of(stub: Stub, **settings: Any) -> TeacherConfig:
    url = f"http://127.0.0.1:{stub.server_port}/v1/"
    return TeacherConfig(base_url=url, model="big", prompt="{question}", **settings)


def wait_for(teacher: Teacher, question: str) -> Verdict:
    deadline = time.monotonic() + WAIT_S
    while (verdict := teacher.verdict(question, [])) is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return verdict


def ask(stub: Stub, question: str = "q", **settings: Any) -> Verdict:
    teacher = Teacher(config_of(stub, **settings))
    teacher.submit(question)
    try:
        return wait_for(teacher, question)
    finally:
        teacher.close()


def test_a_request_and_its_answer(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEACHER_KEY", "secret")
    assert ask(stub, "What is 6*7?", api_key_env="TEACHER_KEY", max_tokens=77) == Verdict("42")
    assert stub.bodies == [
        {
            "model": "big",
            "messages": [{"role": "user", "content": "What is 6*7?"}],
            "max_tokens": 77,
            "temperature": 0.0,
        }
    ]
    assert stub.paths == ["/v1/chat/completions"]
    assert stub.headers[0]["Authorization"] == "Bearer secret"


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_what_passes_is_tried_again(stub: Stub, status: int) -> None:
    stub.plans = {"q": [status, status]}
    assert ask(stub, max_retries=2) == Verdict("42")
    assert len(stub.bodies) == 3


def test_retries_are_bounded(stub: Stub) -> None:
    stub.plans = {"q": [503] * 9}
    assert ask(stub, max_retries=2) == Verdict(None, "the teacher cannot be reached: status 503")
    assert len(stub.bodies) == 3


@pytest.mark.parametrize("status", [401, 500])
def test_a_failure_tells_no_key(
    stub: Stub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, status: int
) -> None:
    """Judges and HTTP rewards ask by the same endpoint."""
    caplog.set_level("DEBUG")
    monkeypatch.setenv("TEACHER_KEY", "key-5ec4e7")
    stub.plans = {"q": [status] * 2}
    try:
        told = ask(stub, api_key_env="TEACHER_KEY", max_retries=1).reason
    except TeacherError as error:
        told = str(error)
    assert str(status) in told
    assert "5ec4e7" in stub.headers[0]["Authorization"]
    assert "5ec4e7" not in told + caplog.text


def test_pauses_between_tries_are_bounded(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Doubled thirty times they would be longer than any run."""
    monkeypatch.setattr(endpoint_module, "LONGEST_PAUSE_S", 0.02)
    stub.plans = {"q": [503] * 30}
    assert ask(stub, max_retries=30) == Verdict("42")


def test_a_silent_server_is_given_up(stub: Stub) -> None:
    silent = threading.Event()
    stub.plans = {"q": [silent]}
    assert ask(stub, timeout_s=0.1, max_retries=9) == Verdict("42")
    stub.plans = {"q": [silent]}
    verdict = ask(stub, timeout_s=0.1, max_retries=0)
    silent.set()
    assert verdict.answer is None
    assert "TimeoutError" in verdict.reason


def test_nobody_there(stub: Stub) -> None:
    config = config_of(stub, max_retries=1)
    stub.shutdown()
    stub.server_close()
    teacher = Teacher(config)
    teacher.submit("q")
    assert "refused" in wait_for(teacher, "q").reason


@pytest.mark.parametrize("text", ["I do not know", "", None, r"\boxed{ }"])
def test_without_an_answer_the_problem_is_refused(stub: Stub, text: str | None) -> None:
    stub.plans = {"q": [completion(text)]}
    assert ask(stub) == Verdict(None, "the teacher gives no answer")


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (401, "status 401; check base_url"),
        (404, "status 404"),
        (b"<html>", "not a chat completion"),
        (b"[]", "not a chat"),
    ],
)
def test_an_endpoint_that_is_none_stops_the_run(stub: Stub, reply: int | bytes, message: str) -> None:
    stub.plans = {"q": [reply]}
    with pytest.raises(TeacherError, match=message) as caught:
        ask(stub)
    assert caught.value.where.endswith("/v1/chat/completions")
    assert len(stub.bodies) == 1


def test_one_question_that_the_endpoint_refuses_stops_no_run(stub: Stub) -> None:
    """A question too long for the teacher, say. Before any answer has come it is the endpoint that is wrong."""
    stub.plans = {"long": [400]}
    with pytest.raises(TeacherError, match="status 400; check base_url"):
        ask(stub, "long")
    stub.plans = {"long": [400]}
    teacher = Teacher(config_of(stub, concurrency=1))
    for question in ("q", "long", "r"):
        teacher.submit(question)
    assert wait_for(teacher, "q") == wait_for(teacher, "r") == Verdict("42")
    assert wait_for(teacher, "long") == Verdict(None, "the teacher refuses the question: status 400")
    stub.plans = {"s": [401]}
    teacher.submit("s")
    with pytest.raises(TeacherError, match="status 401"):
        wait_for(teacher, "s")
    teacher.close()


def test_a_fault_of_the_client_is_told_and_stops_no_thread(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = Teacher(config_of(stub, concurrency=1))
    with monkeypatch.context() as patch:
        patch.setattr(teacher_module, "last_answer", lambda text, pattern: text[10**9])
        teacher.submit("q")
        with pytest.raises(TeacherError, match="the request failed: IndexError"):
            wait_for(teacher, "q")
    teacher.submit("r")
    assert wait_for(teacher, "r") == Verdict("42")
    teacher.close()


@pytest.mark.parametrize("key", ["", "secret\n", "sécret"])
def test_what_is_no_key(stub: Stub, monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setenv("TEACHER_KEY", key)
    with pytest.raises(ConfigError, match="TEACHER_KEY is empty, or has"):
        Teacher(config_of(stub, api_key_env="TEACHER_KEY"))


def test_a_key_that_is_not_set(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TEACHER_KEY", raising=False)
    with pytest.raises(ConfigError, match="TEACHER_KEY is not set"):
        Teacher(config_of(stub, api_key_env="TEACHER_KEY"))


def test_the_config_chooses_the_validator(stub: Stub) -> None:
    sorts = {"kind": "sorting"}
    for section, kind in [
        ({"kind": "program"}, ProgramCheck),
        ({"kind": "vote"}, SelfConsistency),
        (config_of(stub).model_dump(), Teacher),
    ]:
        augment = {"per_step": 1, "validator": section}
        config = validate({"model": {"path": "m"}, "task": sorts, "pool": {"augment": augment}}, "test")
        task = make_task(config.task, lambda text: [1])
        prompts, heldout = task.load(0, 3, print)
        augmenter = make_augmenter(config, task, Pool(prompts, config.pool, 0), prompts, heldout)
        assert augmenter is not None
        assert type(augmenter._validator) is kind
        augmenter.close()


def test_slow_answers_hold_up_no_step_and_come_in_the_order_of_submission(stub: Stub) -> None:
    """The first question's answer takes longest: none of the later ones enters the pool before it."""
    questions = [f"What is {n} times {n}?" for n in range(3)]
    first = threading.Event()
    stub.plans = {questions[0]: [first], questions[1]: [completion("no")], questions[2]: [503]}
    teacher = Teacher(config_of(stub, concurrency=3))
    case = Case(Listed(()), ["What is the sum of one and two?"], AugmentConfig(per_step=1), teacher)
    for question in questions:
        case.read(tagged(question))
    deadline = time.monotonic() + WAIT_S
    while len(teacher._results) < 2:  # the two quick ones
        assert time.monotonic() < deadline
        time.sleep(0.005)
    case.augmenter.resolve_pending()
    assert case.augmenter.outcomes() == []
    first.set()
    outcomes = []
    while len(outcomes) < 3:
        assert time.monotonic() < deadline
        case.augmenter.resolve_pending()
        outcomes += case.augmenter.outcomes()
    case.augmenter.close()
    assert [(o.text, o.answer, o.reason) for o in outcomes] == [
        (questions[0], "late", ""),
        (questions[1], "", "invalid"),
        (questions[2], "42", ""),
    ]
